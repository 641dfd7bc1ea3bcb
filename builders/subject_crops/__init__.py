"""subject_1, subject_2, subject_3 and extract: references of things, and the photographs that show them."""

from builders.subject_crops.builder import SubjectCrops, SubjectCropsParams

__all__ = ["SubjectCrops", "SubjectCropsParams"]
