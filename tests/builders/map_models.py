"""Networks of condition maps with random weights, saved under the names and in the layouts of the published files."""

from __future__ import annotations

import contextlib
import io
import types
from functools import partial
from pathlib import Path
from typing import Any

import torch


def save_hed(folder: Path) -> Path:
    from controlnet_aux.hed import ControlNetHED_Apache2

    return _save(ControlNetHED_Apache2(), folder / "ControlNetHED.pth", faint="projection")


def save_pidinet(folder: Path) -> Path:
    from controlnet_aux.pidi.model import pidinet

    return _save(pidinet(), folder / "table5_pidinet.pth", lambda state: {"state_dict": _prefixed(state)})


def save_teed(folder: Path) -> Path:
    from controlnet_aux.teed.ted import TED

    return _save(TED(), folder / "5_model.pth")


def save_lineart(folder: Path) -> Path:
    from controlnet_aux.lineart import Generator

    _save(Generator(3, 1, 3), folder / "sk_model.pth")
    return _save(Generator(3, 1, 3), folder / "sk_model2.pth", seed=1)


def save_lineart_anime(folder: Path) -> Path:
    from controlnet_aux.lineart_anime import UnetGenerator

    norm = partial(torch.nn.InstanceNorm2d, affine=False, track_running_stats=False)
    return _save(UnetGenerator(3, 1, 8, 64, norm_layer=norm, use_dropout=False), folder / "netG.pth", _prefixed)


def save_mlsd(folder: Path) -> Path:
    from controlnet_aux.mlsd.models.mbv2_mlsd_large import MobileV2_MLSD_Large

    return _save(MobileV2_MLSD_Large(), folder / "mlsd_large_512_fp32.pth")


def save_openpose(folder: Path) -> Path:
    from controlnet_aux.open_pose.face import FaceNet
    from controlnet_aux.open_pose.model import bodypose_model, handpose_model

    def caffe(state: dict[str, Any]) -> dict[str, Any]:
        return {name.partition(".")[2]: tensor for name, tensor in state.items()}

    _save(bodypose_model(), folder / "body_pose_model.pth", caffe)
    _save(handpose_model(), folder / "hand_pose_model.pth", caffe)
    return _save(FaceNet(), folder / "facenet.pth")


def save_normalbae(folder: Path) -> Path:
    from controlnet_aux.normalbae.nets.NNET import NNET

    args = {"mode": "client", "architecture": "BN", "pretrained": "scannet"}
    with contextlib.redirect_stdout(io.StringIO()):
        network = NNET(types.SimpleNamespace(**args, sampling_ratio=0.4, importance_ratio=0.7))
    return _save(network, folder / "scannet.pt", lambda state: {"model": _prefixed(state)})


def save_depth_anything(folder: Path, **config: Any) -> Path:
    """Depth Anything V2 of some thousand parameters, as it is published."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, DPTImageProcessor

    backbone = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    torch.manual_seed(0)
    sizes = {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 8, "reassemble_hidden_size": 16}
    model = DepthAnythingForDepthEstimation(
        DepthAnythingConfig(backbone_config=backbone, head_hidden_size=8, **sizes, **config)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
        model.head.conv3.bias.fill_(1.0)
    model.save_pretrained(folder)
    processor = DPTImageProcessor(
        size={"height": 70, "width": 70}, keep_aspect_ratio=True, ensure_multiple_of=14, do_resize=True
    )
    processor.save_pretrained(folder)
    return folder


def save_midas(folder: Path) -> Path:
    from controlnet_aux.midas.api import MiDaSInference
    from controlnet_aux.midas.midas.dpt_depth import DPTDepthModel

    assert MiDaSInference.MODEL_TYPES_TORCH_HUB  # the module is the one that the detector loads
    network = DPTDepthModel(path=None, backbone="vitb_rn50_384", non_negative=True)
    return _save(network, folder / "dpt_hybrid-midas-501f0c75.pt")


def save_zoe(folder: Path) -> Path:
    from controlnet_aux.zoe import ZoeDepth, get_config

    with contextlib.redirect_stdout(io.StringIO()):
        network = ZoeDepth.build_from_config(get_config("zoedepth", "infer"))
    return _save(network, folder / "ZoeD_M12_N.pt", lambda state: {"model": state})


def save_leres(folder: Path) -> Path:
    from controlnet_aux.leres.leres.multi_depth_model_woauxi import RelDepthModel
    from controlnet_aux.leres.pix2pix.models.pix2pix4depth_model import Pix2Pix4DepthModel
    from controlnet_aux.leres.pix2pix.options.test_options import TestOptions

    options = TestOptions().parse()
    options.gpu_ids = []
    with contextlib.redirect_stdout(io.StringIO()):
        merging = Pix2Pix4DepthModel(options).netG
    _save(merging, folder / "latest_net_G.pth")
    depth = RelDepthModel(backbone="resnext101")
    return _save(depth, folder / "res101.pth", lambda state: {"depth_model": _prefixed(state)})


def _prefixed(state: dict[str, Any]) -> dict[str, Any]:
    """As torch.nn.DataParallel names them."""
    return {f"module.{name}": tensor for name, tensor in state.items()}


def _save(network: torch.nn.Module, path: Path, layout: Any = dict, seed: int = 0, faint: str = "-") -> Path:
    """Weights drawn so that a signal neither dies nor explodes on its way (He initialisation).

    Those with `faint` in their name are small: they lead 0..255 into a sigmoid.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                scale = 0.01 if faint in name else 1.0
                parameter.normal_(0, scale * (2 / parameter[0].numel()) ** 0.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.03, generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(layout(network.state_dict()), path)
    return path.parent
