"""Styles: functions from a photo to an artwork."""
