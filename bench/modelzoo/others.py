"""Models of libraries that were not made for this one: name -> a small model and the arguments of a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from modelzoo.measure import Built

Maker = Callable[[], Built]

SIDE, CLASSES, BATCH = 64, 10, 2
LIBRARIES = {
    "diffusers": "diffusers",
    "litgpt": "litgpt",
    "monai": "monai",
    "open_clip": "open_clip_torch",
    "segmentation_models_pytorch": "segmentation-models-pytorch",
    "torchvision": "torchvision",
    "vit_pytorch": "vit-pytorch",
    "x_transformers": "x-transformers",
}
"""Name to import -> name to install."""


def _image(channels: int = 3, side: int = SIDE, dims: int = 2, batch: int = BATCH) -> Tensor:
    return torch.randn(batch, channels, *(side,) * dims)


def _tokens(vocabulary: int = 64, length: int = 12, batch: int = BATCH) -> Tensor:
    return torch.randint(0, vocabulary, (batch, length))


def _of(path: str, *inputs: Tensor, call: Mapping[str, Any] | None = None, **options: Any) -> Built:
    """A model of the class at `path`, and a call of it."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)(**options), inputs, dict(call or {})


# ---------------------------------------------------------------------------------------------- x-transformers
def _x(
    layers: str = "Decoder", wrapper: Mapping[str, Any] | None = None, inputs: tuple[Tensor, ...] | None = None,
    **options: Any,
) -> Built:  # fmt: skip
    x = import_module("x_transformers")
    stack = getattr(x, layers)(dim=32, depth=2, heads=4, attn_dim_head=8, **options)
    model = x.TransformerWrapper(num_tokens=64, max_seq_len=32, attn_layers=stack, **(wrapper or {}))
    return model, inputs or (_tokens(),), {}


X_TRANSFORMERS: dict[str, Maker] = {
    "decoder": _x,
    "encoder": lambda: _x("Encoder"),
    "rotary": lambda: _x(rotary_pos_emb=True),
    "alibi": lambda: _x(alibi_pos_bias=True),
    "t5_bias": lambda: _x(rel_pos_bias=True),
    "swiglu": lambda: _x(ff_glu=True, ff_swish=True),
    "relu_squared": lambda: _x(ff_relu_squared=True, ff_no_bias=True),
    "rmsnorm": lambda: _x(use_rmsnorm=True),
    "simple_rmsnorm": lambda: _x(use_simple_rmsnorm=True),
    "scalenorm": lambda: _x(use_scalenorm=True),
    "qk_norm": lambda: _x(attn_qk_norm=True),
    "qk_norm_scaled": lambda: _x(attn_qk_norm=True, attn_qk_norm_dim_scale=True),
    "one_kv_head": lambda: _x(attn_one_kv_head=True),
    "kv_heads": lambda: _x(attn_kv_heads=2),
    "talking_heads": lambda: _x(attn_pre_talking_heads=True, attn_post_talking_heads=True),
    "gate_values": lambda: _x(attn_gate_values=True),
    "head_scale": lambda: _x(attn_head_scale=True),
    "memory_kv": lambda: _x(attn_num_mem_kv=4),
    "on_attention": lambda: _x(attn_on_attn=True),
    "sandwich_norm": lambda: _x(sandwich_norm=True),
    "residual_attention": lambda: _x(residual_attn=True),
    "gate_residual": lambda: _x(gate_residual=True),
    "scale_residual": lambda: _x(scale_residual=True),
    "shift_tokens": lambda: _x(shift_tokens=1),
    "macaron": lambda: _x(macaron=True),
    "cross_residual": lambda: _x("Encoder", cross_residual_attn=True),
    "hyper_connections": lambda: _x(num_residual_streams=2),
    "value_residual": lambda: _x(add_value_residual=True),
    "memory_tokens": lambda: _x(wrapper={"num_memory_tokens": 4}),
    "tied": lambda: _x(wrapper={"tie_embedding": True}),
    "flash": lambda: _x(attn_flash=True),
    "vit": lambda: (
        import_module("x_transformers").ViTransformerWrapper(
            image_size=32, patch_size=8, num_classes=CLASSES,
            attn_layers=import_module("x_transformers").Encoder(dim=32, depth=2, heads=4, attn_dim_head=8),
        ), (_image(side=32),), {},
    ),
    "continuous": lambda: (
        import_module("x_transformers").ContinuousTransformerWrapper(
            dim_in=16, dim_out=12, max_seq_len=32,
            attn_layers=import_module("x_transformers").Encoder(dim=32, depth=2, heads=4, attn_dim_head=8),
        ), (torch.randn(BATCH, 12, 16),), {},
    ),
    "encoder_decoder": lambda: _of(
        "x_transformers.XTransformer", _tokens(), _tokens(), dim=32, enc_num_tokens=64, enc_depth=2, enc_heads=4,
        enc_max_seq_len=32, dec_num_tokens=64, dec_depth=2, dec_heads=4, dec_max_seq_len=32,
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- vit-pytorch
def _vit(path: str, *inputs: Tensor, **options: Any) -> Built:
    plain = {"image_size": 32, "patch_size": 8, "num_classes": CLASSES, "dim": 32, "depth": 2, "heads": 4,
             "mlp_dim": 64}  # fmt: skip
    chosen = {name: value for name, value in (plain | options).items() if value is not None}
    return _of(f"vit_pytorch.{path}", *(inputs or (_image(side=32),)), **chosen)


VIT_PYTORCH: dict[str, Maker] = {
    "vit": lambda: _vit("vit.ViT"),
    "simple": lambda: _vit("simple_vit.SimpleViT"),
    "simple_qk_norm": lambda: _vit("simple_vit_with_qk_norm.SimpleViT"),
    "simple_registers": lambda: _vit("simple_vit_with_register_tokens.SimpleViT"),
    "simple_value_residual": lambda: _vit("simple_vit_with_value_residual.SimpleViT"),
    "simple_hyper": lambda: _vit("simple_vit_with_hyper_connections.SimpleViT", num_residual_streams=2),
    "simple_fft": lambda: _vit("simple_vit_with_fft.SimpleViT", freq_patch_size=8),
    "simple_1d": lambda: _vit(
        "simple_vit_1d.SimpleViT", torch.randn(BATCH, 3, 64), image_size=None, seq_len=64),
    "simple_3d": lambda: _vit(
        "simple_vit_3d.SimpleViT", _image(dims=3, side=16), image_size=16, image_patch_size=8, frames=16,
        frame_patch_size=8, patch_size=None),
    "deep": lambda: _vit("deepvit.DeepViT"),
    "parallel": lambda: _vit("parallel_vit.ViT", num_parallel_branches=2),
    "normalized": lambda: _vit("normalized_vit.nViT"),
    "small_dataset": lambda: _vit("vit_for_small_dataset.ViT"),
    "patch_merger": lambda: _vit("vit_with_patch_merger.ViT", patch_merge_layer=1, patch_merge_num_tokens=4),
    "cait": lambda: _vit("cait.CaiT", cls_depth=1),
    "cross": lambda: _of("vit_pytorch.cross_vit.CrossViT", _image(side=96), image_size=96, num_classes=CLASSES,
                         sm_dim=16, lg_dim=32, sm_enc_heads=2, lg_enc_heads=2, sm_enc_dim_head=8, lg_enc_dim_head=8,
                         sm_enc_depth=1, lg_enc_depth=1, depth=1),
    "cct": lambda: _of("vit_pytorch.cct.CCT", _image(side=32), img_size=32, embedding_dim=32, n_conv_layers=1,
                       kernel_size=3, stride=1, padding=1, num_layers=2, num_heads=4, mlp_ratio=2,
                       num_classes=CLASSES, positional_embedding="learnable"),
    "pit": lambda: _vit("pit.PiT", depth=(1, 1)),
    "levit": lambda: _of("vit_pytorch.levit.LeViT", _image(), image_size=SIDE, num_classes=CLASSES, stages=2,
                         dim=(16, 32), depth=1, heads=(2, 4), mlp_mult=2, dim_key=8, dim_value=8),
    "cvt": lambda: _of("vit_pytorch.cvt.CvT", _image(), num_classes=CLASSES, s1_emb_dim=16, s2_emb_dim=16,
                       s3_emb_dim=32, s1_depth=1, s2_depth=1, s3_depth=1, s1_heads=1, s2_heads=2, s3_heads=2),
    "twins": lambda: _of("vit_pytorch.twins_svt.TwinsSVT", _image(side=224), num_classes=CLASSES, s1_emb_dim=16,
                         s2_emb_dim=16, s3_emb_dim=16, s4_emb_dim=32, s1_depth=1, s2_depth=1, s3_depth=1, s4_depth=1),
    "crossformer": lambda: _of("vit_pytorch.crossformer.CrossFormer", _image(side=224), num_classes=CLASSES,
                               dim=(32, 32, 32, 64), depth=(1, 1, 1, 1), global_window_size=(8, 4, 2, 1),
                               local_window_size=7),
    "regionvit": lambda: _of("vit_pytorch.regionvit.RegionViT", _image(side=224), dim=(16, 16, 16, 32),
                             depth=(1, 1, 1, 1), window_size=7, num_classes=CLASSES),
    "scalable": lambda: _of("vit_pytorch.scalable_vit.ScalableViT", _image(side=256), num_classes=CLASSES, dim=16,
                            heads=(1, 2, 2, 2), depth=(1, 1, 1, 1), ssa_dim_key=(8, 8, 8, 8),
                            reduction_factor=(8, 4, 2, 1), window_size=(64, 32, None, None)),
    "sep": lambda: _of("vit_pytorch.sep_vit.SepViT", _image(side=224), num_classes=CLASSES, dim=16, dim_head=8,
                       heads=(1, 2, 2, 2), depth=(1, 1, 1, 1), window_size=7),
    "maxvit": lambda: _of("vit_pytorch.max_vit.MaxViT", _image(side=224), num_classes=CLASSES, dim_conv_stem=16,
                          dim=16, dim_head=8, depth=(1, 1), window_size=7),
    "mobilevit": lambda: _of("vit_pytorch.mobile_vit.MobileViT", _image(side=64), image_size=(64, 64),
                             dims=[24, 32, 40], num_classes=CLASSES,
                             channels=[8, 8, 16, 16, 16, 16, 24, 24, 24, 24, 32]),
    "nest": lambda: _of("vit_pytorch.nest.NesT", _image(side=32), image_size=32, patch_size=4, dim=16, heads=2,
                        num_hierarchies=2, block_repeats=(1, 1), num_classes=CLASSES),
    "xcit": lambda: _vit("xcit.XCiT", cls_depth=1, local_patch_kernel_size=3),
    "vivit": lambda: _vit("vivit.ViViT", _image(side=32, dims=3)[:, :, :8], image_patch_size=8, patch_size=None,
                          frames=8, frame_patch_size=4, spatial_depth=1, temporal_depth=1, depth=None),
    "learnable_memory": lambda: _vit("learnable_memory_vit.ViT"),
    "vit_1d": lambda: _vit("vit_1d.ViT", torch.randn(BATCH, 3, 64), image_size=None, seq_len=64),
    "rotary": lambda: _vit("rvt.RvT"),
    "t2t": lambda: _of("vit_pytorch.t2t.T2TViT", _image(), image_size=SIDE, dim=32, depth=2, heads=4, mlp_dim=64,
                       num_classes=CLASSES, t2t_layers=((7, 4), (3, 2))),
}  # fmt: skip


# -------------------------------------------------------------------------------------------------- torchvision
def _tv(name: str, *inputs: Tensor, **options: Any) -> Built:
    models = import_module("torchvision.models")
    return models.get_model(name, weights=None, **options), inputs or (_image(),), {}


TORCHVISION: dict[str, Maker] = {
    **{
        name: (lambda name=name: _tv(name, num_classes=CLASSES))  # type: ignore[misc]
        for name in (
            "resnet18", "resnet50", "resnext50_32x4d", "densenet121", "squeezenet1_1",
            "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5", "shufflenet_v2_x0_5", "efficientnet_b0",
            "efficientnet_v2_s", "regnet_x_400mf", "regnet_y_400mf", "convnext_tiny", "swin_t", "swin_v2_t",
        )
    },
    "googlenet": lambda: _tv("googlenet", num_classes=CLASSES, aux_logits=False, init_weights=False),
    "inception_v3": lambda: _tv("inception_v3", _image(side=96), num_classes=CLASSES, aux_logits=False,
                                init_weights=False),
    "vit": lambda: _of("torchvision.models.VisionTransformer", _image(side=32), image_size=32, patch_size=8,
                       num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=CLASSES),
    "maxvit": lambda: _of("torchvision.models.MaxVit", _image(side=64), input_size=(64, 64), stem_channels=16,
                          partition_size=2, block_channels=[16, 32], block_layers=[1, 1], head_dim=8,
                          stochastic_depth_prob=0.1, num_classes=CLASSES),
    "fcn_resnet50": lambda: _tv("fcn_resnet50", num_classes=CLASSES, weights_backbone=None),
    "deeplabv3": lambda: _tv("deeplabv3_mobilenet_v3_large", num_classes=CLASSES, weights_backbone=None),
    "lraspp": lambda: _tv("lraspp_mobilenet_v3_large", num_classes=CLASSES, weights_backbone=None),
    "r3d_18": lambda: _tv("r3d_18", _image(side=32, dims=3)[:, :, :8], num_classes=CLASSES),
    "mvit": lambda: _tv("mvit_v2_s", _image(side=224, dims=2, batch=1)[:, :, None].repeat(1, 1, 16, 1, 1),
                        num_classes=CLASSES),
    "raft": lambda: _tv("raft_small", _image(side=128, batch=1), _image(side=128, batch=1)),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- open_clip
def _clip(vision: Mapping[str, Any], text: Mapping[str, Any] | None = None, kind: str = "CLIP") -> Built:
    open_clip = import_module("open_clip")
    towers = {"vision_cfg": {"image_size": 32, **vision}, "text_cfg": {
        "context_length": 16, "vocab_size": 64, "width": 32, "heads": 4, "layers": 2, **(text or {})}}  # fmt: skip
    model = getattr(open_clip, kind)(embed_dim=16, **towers)
    return model, (_image(side=32), _tokens(64, 16)), {}


_PATCHES = {"layers": 2, "width": 32, "head_width": 8, "patch_size": 8}
OPEN_CLIP: dict[str, Maker] = {
    "clip_vit": lambda: _clip(_PATCHES),
    "clip_resnet": lambda: _clip({"layers": [1, 1, 1, 1], "width": 8}),
    "clip_gelu": lambda: _clip({**_PATCHES, "ls_init_value": 0.1}),
    "clip_pooled": lambda: _clip({**_PATCHES, "attentional_pool": True, "attn_pooler_heads": 4}),
    "custom_text": lambda: _clip(_PATCHES, kind="CustomTextCLIP"),
    "coca": lambda: (
        import_module("open_clip.coca_model").CoCa(
            embed_dim=32, multimodal_cfg={"context_length": 16, "vocab_size": 64, "width": 32, "heads": 4, "layers": 2},
            text_cfg={"context_length": 16, "vocab_size": 64, "width": 32, "heads": 4, "layers": 2,
                      "embed_cls": True, "output_tokens": True},
            vision_cfg={"image_size": 32, **_PATCHES, "attentional_pool": True, "attn_pooler_heads": 4,
                        "output_tokens": True},
        ), (_image(side=32), _tokens(64, 15)), {},
    ),
}  # fmt: skip


# -------------------------------------------------------------------------------------------------------- monai
def _monai(name: str, *inputs: Tensor, **options: Any) -> Built:
    return _of(f"monai.networks.nets.{name}", *(inputs or (_image(1),)), **options)


MONAI: dict[str, Maker] = {
    "unet": lambda: _monai("UNet", spatial_dims=2, in_channels=1, out_channels=2, channels=(8, 16, 32),
                           strides=(2, 2), num_res_units=2),
    "basic_unet": lambda: _monai("BasicUNet", spatial_dims=2, in_channels=1, features=(8, 8, 16, 32, 64, 8)),
    "unet_plus": lambda: _monai("BasicUNetPlusPlus", spatial_dims=2, in_channels=1, features=(8, 8, 16, 32, 64, 8)),
    "attention_unet": lambda: _monai("AttentionUnet", spatial_dims=2, in_channels=1, out_channels=2,
                                     channels=(8, 16, 32), strides=(2, 2)),
    "dynunet": lambda: _monai("DynUNet", spatial_dims=2, in_channels=1, out_channels=2, kernel_size=[3, 3, 3],
                              strides=[1, 2, 2], upsample_kernel_size=[2, 2], filters=[8, 16, 32]),
    "segresnet": lambda: _monai("SegResNet", spatial_dims=2, init_filters=8, in_channels=1),
    "unetr": lambda: _monai("UNETR", _image(1, 32), in_channels=1, out_channels=2, img_size=32, feature_size=8,
                            hidden_size=48, mlp_dim=64, num_heads=4, spatial_dims=2),
    "swin_unetr": lambda: _monai("SwinUNETR", in_channels=1, out_channels=2, feature_size=12, spatial_dims=2,
                                 depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4)),
    "vit": lambda: _monai("ViT", _image(1, 32), in_channels=1, img_size=32, patch_size=8, hidden_size=32, mlp_dim=64,
                          num_layers=2, num_heads=4, spatial_dims=2, classification=True),
    "vnet": lambda: _monai("VNet", spatial_dims=2, in_channels=1, out_channels=2, dropout_dim=2),
    "highresnet": lambda: _monai("HighResNet", spatial_dims=2, in_channels=1, out_channels=2),
    "resnet": lambda: _monai("ResNet", block="basic", layers=[1, 1, 1, 1], block_inplanes=[8, 16, 32, 64],
                             spatial_dims=2, n_input_channels=1, num_classes=CLASSES),
    "densenet": lambda: _monai("DenseNet", spatial_dims=2, in_channels=1, out_channels=CLASSES,
                               block_config=(2, 2), init_features=8, growth_rate=8),
    "senet": lambda: _monai("SEResNet50", spatial_dims=2, in_channels=1, num_classes=CLASSES),
    "autoencoder": lambda: _monai("AutoEncoder", spatial_dims=2, in_channels=1, out_channels=1, channels=(8, 16),
                                  strides=(2, 2)),
    "autoencoder_kl": lambda: _monai("AutoencoderKL", spatial_dims=2, channels=(8, 16), num_res_blocks=(1, 1),
                                     attention_levels=(False, True), norm_num_groups=4),
    "diffusion_unet": lambda: _monai("DiffusionModelUNet", _image(1, 16), torch.tensor([3, 7]), spatial_dims=2,
                                     in_channels=1, out_channels=1, num_res_blocks=1, channels=(8, 16),
                                     attention_levels=(False, True), norm_num_groups=4, num_head_channels=8),
    "restormer": lambda: _monai("restormer.Restormer", spatial_dims=2, in_channels=1, out_channels=1, dim=16,
                                num_blocks=(1, 1), heads=(2, 2), num_refinement_blocks=1),
    "mednext": lambda: _monai("MedNeXt", spatial_dims=2, init_filters=8, in_channels=1, out_channels=2,
                              blocks_down=(1, 1, 1, 1), blocks_up=(1, 1, 1, 1)),
    "efficientnet": lambda: _monai("EfficientNetBN", model_name="efficientnet-b0", pretrained=False, spatial_dims=2,
                                   in_channels=1, num_classes=CLASSES),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ smp
def _smp(name: str, **options: Any) -> Built:
    kind = getattr(import_module("segmentation_models_pytorch"), name)
    model = kind(**{"encoder_name": "resnet18", "encoder_weights": None, "classes": 2} | options)
    return model, (_image(side=128),), {}


SMP: dict[str, Maker] = {
    **{name.lower(): (lambda name=name: _smp(name)) for name in  # type: ignore[misc]
       ("Unet", "UnetPlusPlus", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus", "Linknet", "MAnet", "PAN", "UPerNet",
        "Segformer")},
    "unet_mobilenet": lambda: _smp("Unet", encoder_name="mobilenet_v2"),
    "unet_efficientnet": lambda: _smp("Unet", encoder_name="efficientnet-b0"),
    "unet_densenet": lambda: _smp("Unet", encoder_name="densenet121"),
    "fpn_mit": lambda: _smp("FPN", encoder_name="mit_b0"),
    "unet_scse": lambda: _smp("Unet", decoder_attention_type="scse"),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------- litgpt
def _litgpt(**options: Any) -> Built:
    gpt = import_module("litgpt.model")
    config = import_module("litgpt.config").Config(
        **{"name": "small", "block_size": 32, "vocab_size": 64, "padded_vocab_size": 64, "n_layer": 2, "n_head": 4,
           "n_embd": 32, "intermediate_size": 64} | options
    )  # fmt: skip
    return gpt.GPT(config), (_tokens(),), {}


_LLAMA = {"mlp_class_name": "LLaMAMLP", "norm_class_name": "RMSNorm", "bias": False, "rotary_percentage": 1.0,
          "parallel_residual": False}  # fmt: skip
LITGPT: dict[str, Maker] = {
    "neox": _litgpt,
    "llama": lambda: _litgpt(**_LLAMA),
    "llama_groups": lambda: _litgpt(**_LLAMA, n_query_groups=2),
    "gemma": lambda: _litgpt(**_LLAMA | {"mlp_class_name": "GemmaMLP"}, scale_embeddings=True, n_query_groups=1),
    "gemma_2": lambda: _litgpt(
        **_LLAMA | {"mlp_class_name": "GemmaMLP"}, scale_embeddings=True, n_query_groups=2, post_attention_norm=True,
        post_mlp_norm=True, attention_logit_softcapping=50.0, final_logit_softcapping=30.0, sliding_window_size=8,
        sliding_window_indices=[1, 0],
    ),
    "moe": lambda: _litgpt(**_LLAMA | {"mlp_class_name": "LLaMAMoE"}, n_expert=4, n_expert_per_token=2,
                           moe_intermediate_size=32),
    "qk_norm": lambda: _litgpt(**_LLAMA, norm_qk=True),
    "parallel": lambda: _litgpt(parallel_residual=True, shared_attention_norm=True),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ diffusers
def _diffusers(name: str, *inputs: Tensor, call: Mapping[str, Any] | None = None, **options: Any) -> Built:
    return _of(f"diffusers.{name}", *inputs, call={"return_dict": False, **(call or {})}, **options)


def _times() -> Tensor:
    return torch.tensor([3, 7])


def _words(width: int, length: int = 6) -> Tensor:
    return torch.randn(BATCH, length, width)


DIFFUSERS: dict[str, Maker] = {
    "unet_2d": lambda: _diffusers(
        "UNet2DModel", _image(3, 16), _times(), sample_size=16, block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=4, attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D")),
    "unet_2d_condition": lambda: _diffusers(
        "UNet2DConditionModel", _image(4, 16), _times(), _words(16), sample_size=16, block_out_channels=(16, 32),
        layers_per_block=1, norm_num_groups=4, attention_head_dim=2, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")),
    "unet_1d": lambda: _diffusers(
        "UNet1DModel", torch.randn(BATCH, 2, 64), _times(), sample_size=64, in_channels=2, out_channels=2,
        extra_in_channels=32, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D"), up_block_types=("UpBlock1D", "UpBlock1DNoSkip")),
    "autoencoder_kl": lambda: _diffusers(
        "AutoencoderKL", _image(3, 32), block_out_channels=(16, 32), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2),
    "autoencoder_tiny": lambda: _diffusers(
        "AutoencoderTiny", _image(3, 32), encoder_block_out_channels=(16, 16), decoder_block_out_channels=(16, 16),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)),
    "vq": lambda: _diffusers("VQModel", _image(3, 32), block_out_channels=(16, 32), norm_num_groups=4,
                             latent_channels=3, down_block_types=("DownEncoderBlock2D",) * 2,
                             up_block_types=("UpDecoderBlock2D",) * 2),
    "dit": lambda: _diffusers(
        "DiTTransformer2DModel", _image(4, 8), call={"timestep": _times(), "class_labels": torch.tensor([1, 2])},
        num_attention_heads=4, attention_head_dim=8, in_channels=4, num_layers=2, norm_num_groups=4, sample_size=8,
        num_embeds_ada_norm=10),
    "pixart": lambda: _diffusers(
        "PixArtTransformer2DModel", _image(4, 8), call={
            "encoder_hidden_states": _words(16), "timestep": _times(),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        cross_attention_dim=32, caption_channels=16, use_additional_conditions=False),
    "sd3": lambda: _diffusers(
        "SD3Transformer2DModel", _image(4, 8), call={
            "encoder_hidden_states": _words(16), "pooled_projections": torch.randn(BATCH, 24), "timestep": _times()},
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=16, caption_projection_dim=32, pooled_projection_dim=24, out_channels=4),
    "flux": lambda: _diffusers(
        "FluxTransformer2DModel", torch.randn(BATCH, 16, 4), call={
            "encoder_hidden_states": _words(16), "pooled_projections": torch.randn(BATCH, 24),
            "timestep": torch.tensor([0.3, 0.7]), "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(6, 3)},
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=24, axes_dims_rope=(4, 4, 8)),
    "transformer_2d": lambda: _diffusers(
        "Transformer2DModel", _image(8, 8), call={"encoder_hidden_states": _words(16)}, num_attention_heads=2,
        attention_head_dim=8, in_channels=8, num_layers=1, norm_num_groups=4, cross_attention_dim=16),
    "prior": lambda: _diffusers(
        "PriorTransformer", torch.randn(BATCH, 16), call={
            "timestep": _times(), "proj_embedding": torch.randn(BATCH, 16), "encoder_hidden_states": _words(16, 7)},
        num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=16, num_embeddings=7,
        additional_embeddings=4),
    "lumina": lambda: _diffusers(
        "LTXVideoTransformer3DModel", torch.randn(BATCH, 8, 4), call={
            "encoder_hidden_states": _words(16), "timestep": torch.tensor([300.0, 700.0]),
            "encoder_attention_mask": torch.ones(BATCH, 6), "num_frames": 2, "height": 2, "width": 2},
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=2, caption_channels=16),
    "wan": lambda: _diffusers(
        "WanTransformer3DModel", torch.randn(BATCH, 4, 2, 8, 8), call={
            "timestep": _times(), "encoder_hidden_states": _words(16)},
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=2),
}  # fmt: skip

MODELS: dict[str, Maker] = {
    f"{library}/{name}": make
    for library, models in {
        "x_transformers": X_TRANSFORMERS, "vit_pytorch": VIT_PYTORCH, "torchvision": TORCHVISION,
        "open_clip": OPEN_CLIP, "monai": MONAI, "segmentation_models_pytorch": SMP, "litgpt": LITGPT,
        "diffusers": DIFFUSERS,
    }.items()
    for name, make in models.items()
}  # fmt: skip
