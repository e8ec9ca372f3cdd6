"""Every denoiser that diffusers exports, in a tiny configuration: UNets, transformers, ControlNets and priors.

A case makes a model, a batch of B samples and per-sample losses. The configurations are the arguments of each class,
reduced to a few channels and one or two layers. ``LEFT_OUT`` names the exported models that have no case, each with its
reason. denoisers.py checks the cases.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import unittest.mock
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

B = 6  # samples of a batch

Make = Callable[[int, torch.Generator, torch.dtype], Tensor]


# ---- inputs of a batch -----------------------------------------------------------------------------------------------


def f(*shape: int) -> Make:
    """Return normal numbers ``[B, *shape]``."""
    return lambda n, g, dtype: torch.randn(n, *shape, generator=g, dtype=torch.float64).to(dtype)


def u(*shape: int, scale: float = 1.0) -> Make:
    """Return uniform numbers in ``[0, scale)``."""
    return lambda n, g, dtype: (scale * torch.rand(n, *shape, generator=g, dtype=torch.float64)).to(dtype)


def ids(high: int, *shape: int) -> Make:
    """Return integers in ``[0, high)``."""
    return lambda n, g, dtype: torch.randint(high, (n, *shape), generator=g)


def const(values: Any, dtype: torch.dtype | None = None) -> Make:
    """Return the same values for each sample."""
    value = torch.as_tensor(values)
    return lambda n, g, own: value.to(dtype or own).expand(n, *value.shape).clone()


def mask(length: int, dtype: torch.dtype | None = torch.bool) -> Make:
    """Return masks of several lengths: sample i keeps ``length``, ``length - 1`` or ``length - 2`` tokens."""

    def make(n: int, g: torch.Generator, own: torch.dtype) -> Tensor:
        kept = torch.tensor([length - i % 3 for i in range(n)])
        return (torch.arange(length) < kept[:, None]).to(dtype or own)

    return make


def full(length: int, dtype: torch.dtype | None = torch.bool) -> Make:
    """Return masks that keep all tokens."""
    return lambda n, g, own: torch.ones(n, length, dtype=dtype or own)


T = u(scale=1000.0)  # timesteps
IDS = torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(4)).double()  # positions of 4 x 4 tokens
TEXT_IDS = torch.zeros(5, 3, dtype=torch.float64)


# ---- cases -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of diffusers in a tiny configuration.

    Attributes:
        name: the name of the class, with a remark if the class has several cases.
        model: the class that diffusers exports.
        config: the arguments of the class.
        inputs: the arguments of the forward that differ between samples. A name with a dot belongs into a dict.
        shared: the arguments of the forward that all samples share.
        call: calls the model where keyword arguments are not enough.
        make: makes the model where a class and its arguments are not enough.
        train: whether the model is in training mode.
        dtype: float64, except for classes that cannot compute in it.
    """

    name: str
    model: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Make]
    shared: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    call: Callable[..., Any] | None = None
    make: Callable[[], nn.Module] | None = None
    train: bool = False
    dtype: torch.dtype = torch.float64

    def build(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return the model with noise on all weights, so that no gradient is zero because a weight is."""
        return spread(self.initial(dtype))

    def initial(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return the model as its class initialises it; NaN where the class leaves memory uninitialised becomes 0."""
        torch.manual_seed(0)
        # Deterministic mode fills memory that a class allocates and does not initialise with NaN.
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            model = self.make() if self.make else self.model_class()(**self.config)
        finally:
            torch.use_deterministic_algorithms(before)
        model = model.to(dtype or self.dtype).train(self.train)
        with torch.no_grad():
            for p in model.parameters():
                p.nan_to_num_()
        return model

    def model_class(self) -> type[nn.Module]:
        import diffusers

        return getattr(diffusers, self.model, None) or getattr(diffusers.models, self.model)

    def batch(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(2)
        return {name: make(B, g, dtype or self.dtype) for name, make in self.inputs.items()}

    def loss_fn(self, model: nn.Module, dtype: torch.dtype | None = None) -> Callable[[dict[str, Tensor]], Tensor]:
        """Return a function that gives the per-sample losses of a batch: the distance of all outputs from 1."""
        shared = {k: to_dtype(v, dtype or self.dtype) for k, v in self.shared.items()}
        extra = {"return_dict": False} if "return_dict" in inspect.signature(type(model).forward).parameters else {}

        def losses(batch: dict[str, Tensor]) -> Tensor:
            if self.call is not None:
                outputs = self.call(model, **batch, **shared)
            else:
                outputs = model(**nested(batch), **shared, **extra)
            n = len(next(iter(batch.values())))
            return sum((x - 1).reshape(n, -1).square().mean(1) for x in tensors(outputs))

        return losses


def to_dtype(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, list | tuple):
        return type(value)(to_dtype(v, dtype) for v in value)
    return value


def nested(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return keyword arguments: ``a.b`` becomes the entry b of the dict a."""
    out: dict[str, Any] = {}
    for name, value in batch.items():
        head, _, tail = name.partition(".")
        if tail:
            out.setdefault(head, {})[tail] = value
        else:
            out[name] = value
    return out


def tensors(outputs: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors of a nested output."""
    if isinstance(outputs, Tensor):
        if outputs.is_floating_point():
            yield outputs
    elif isinstance(outputs, Mapping):
        for value in outputs.values():
            yield from tensors(value)
    elif isinstance(outputs, list | tuple):
        for value in outputs:
            yield from tensors(value)


def spread(model: nn.Module) -> nn.Module:
    """Add the same noise to the weights at each call."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype))
    return model


CASES: list[Case] = []


def add(name: str, config: Mapping[str, Any], inputs: Mapping[str, Make], **options: Any) -> None:
    """Register a case. ``name`` is the class, followed by a comma and a remark if there are several."""
    CASES.append(Case(name, name.partition(",")[0], config, inputs, **options))


# fmt: off

# ---- UNets

RESNET_1D = dict(in_channels=6, out_channels=6, block_out_channels=(8, 8, 16, 16), time_embedding_type="positional",
    use_timestep_embedding=True, flip_sin_to_cos=False, freq_shift=1.0, act_fn="mish",
    down_block_types=("DownResnetBlock1D",) * 4)
add("UNet1DModel", RESNET_1D | dict(mid_block_type="MidResTemporalBlock1D", out_block_type="OutConv1DBlock",
    up_block_types=("UpResnetBlock1D",) * 3), dict(sample=f(6, 16), timestep=T))
add("UNet1DModel, value function", RESNET_1D | dict(block_out_channels=(16, 32, 64, 64),
    mid_block_type="ValueFunctionMidBlock1D", out_block_type="ValueFunction", up_block_types=(),
    downsample_each_block=True), dict(sample=f(6, 16), timestep=T))
add("UNet1DModel, audio", dict(in_channels=2, out_channels=2, extra_in_channels=64, block_out_channels=(32, 32, 64),
    sample_size=64), dict(sample=f(2, 64), timestep=u()))
UNET = dict(sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1)
UNET_2D = UNET | dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8)
add("UNet2DModel", UNET_2D, dict(sample=f(3, 8, 8), timestep=T))
add("UNet2DModel, classes and scale-shift", UNET_2D | dict(num_class_embeds=5, resnet_time_scale_shift="scale_shift",
    downsample_type="resnet", upsample_type="resnet"), dict(sample=f(3, 8, 8), timestep=T, class_labels=ids(5)))
add("UNet2DModel, NCSN++", dict(block_out_channels=(32, 64), layers_per_block=1, time_embedding_type="fourier",
    norm_num_groups=None, mid_block_scale_factor=2 ** 0.5, down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
    up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D")), dict(sample=f(3, 8, 8), timestep=u(scale=10.0)))
COND = dict(cross_attention_dim=8, attention_head_dim=2)
UNET_COND = UNET | COND | dict(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
TEXT_TO_IMAGE = dict(sample=f(4, 8, 8), timestep=T, encoder_hidden_states=f(5, 8))
add("UNet2DConditionModel", UNET_COND, TEXT_TO_IMAGE)
add("UNet2DConditionModel, text masks", UNET_COND, TEXT_TO_IMAGE | dict(encoder_attention_mask=mask(5)))
SDXL = dict(use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=6 * 4 + 8)
SDXL_INPUTS = {"added_cond_kwargs.text_embeds": f(8), "added_cond_kwargs.time_ids": u(6, scale=512.0)}
add("UNet2DConditionModel, SDXL", UNET_COND | SDXL | dict(transformer_layers_per_block=(1, 2)),
    TEXT_TO_IMAGE | SDXL_INPUTS)
add("UNet2DConditionModel, DeepFloyd IF", UNET | COND | dict(attention_head_dim=4, encoder_hid_dim=12,
    addition_embed_type="text", addition_embed_type_num_heads=2, resnet_time_scale_shift="scale_shift",
    class_embed_type="timestep", act_fn="gelu", only_cross_attention=True,
    mid_block_type="UNetMidBlock2DSimpleCrossAttn", down_block_types=("ResnetDownsampleBlock2D",
    "SimpleCrossAttnDownBlock2D"), up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D")),
    dict(sample=f(4, 8, 8), timestep=T, encoder_hidden_states=f(5, 12), class_labels=T))
add("UNet2DConditionModel, Kandinsky 2.2", UNET_COND | dict(encoder_hid_dim=12, encoder_hid_dim_type="image_proj",
    addition_embed_type="image", cross_attention_dim=8, time_cond_proj_dim=None,
    projection_class_embeddings_input_dim=None), {"sample": f(4, 8, 8), "timestep": T,
    "added_cond_kwargs.image_embeds": f(12)}, call=lambda net, **x: net(encoder_hidden_states=None, return_dict=False,
    **nested(x)))
UNET_3D = UNET | COND | dict(down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
    up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"))
add("UNet3DConditionModel", UNET_3D, dict(sample=f(4, 3, 8, 8), timestep=T, encoder_hidden_states=f(5, 8)))
add("I2VGenXLUNet", UNET_3D, dict(sample=f(4, 3, 8, 8), timestep=T, fps=u(scale=30.0), image_latents=f(4, 3, 8, 8),
    image_embeddings=f(8), encoder_hidden_states=f(5, 8)))


def per_frame(net: nn.Module, encoder_hidden_states: Tensor, **x: Tensor) -> Any:
    """Call a video UNet that wants the text of each of the three frames."""
    return net(encoder_hidden_states=encoder_hidden_states.repeat_interleave(3, 0), return_dict=False, **x)


add("UNetMotionModel", UNET | dict(cross_attention_dim=8, num_attention_heads=2, motion_num_attention_heads=2,
    down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), up_block_types=("UpBlockMotion",
    "CrossAttnUpBlockMotion")), dict(sample=f(4, 3, 8, 8), timestep=T, encoder_hidden_states=f(5, 8)), call=per_frame)
add("UNetSpatioTemporalConditionModel", dict(sample_size=8, block_out_channels=(32, 64), layers_per_block=1,
    cross_attention_dim=8, num_attention_heads=2, in_channels=4, addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=12, down_block_types=("CrossAttnDownBlockSpatioTemporal",
    "DownBlockSpatioTemporal"), up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")),
    dict(sample=f(3, 4, 8, 8), timestep=T, encoder_hidden_states=f(1, 8), added_time_ids=u(3, scale=100.0)))
add("Kandinsky3UNet", dict(time_embedding_dim=8, groups=2, attention_head_dim=4, layers_per_block=2,
    block_out_channels=(8, 16, 32, 64), cross_attention_dim=8, encoder_hid_dim=12),
    dict(sample=f(4, 8, 8), timestep=T, encoder_hidden_states=f(5, 12), encoder_attention_mask=mask(5, torch.int64)))
CASCADE = dict(in_channels=4, out_channels=4, timestep_ratio_embedding_dim=8, conditioning_dim=8,
    block_out_channels=(8, 8), num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1),
    up_num_layers_per_block=(1, 1), clip_text_pooled_in_channels=8, clip_seq=2, switch_level=(False,))
add("StableCascadeUNet, prior", CASCADE | dict(clip_text_in_channels=8, clip_image_in_channels=8),
    dict(sample=f(4, 8, 8), timestep_ratio=u(), clip_text_pooled=f(1, 8), clip_text=f(5, 8), clip_img=f(1, 8)))
add("StableCascadeUNet, decoder", CASCADE | dict(patch_size=2, effnet_in_channels=4, pixel_mapper_in_channels=3,
    switch_level=None, timestep_conditioning_type=("sca",)), dict(sample=f(4, 8, 8), timestep_ratio=u(),
    clip_text_pooled=f(1, 8), effnet=f(4, 4, 4), pixels=f(3, 8, 8)))
add("UVit2DModel", dict(hidden_size=16, cond_embed_dim=8, micro_cond_encode_dim=4, micro_cond_embed_dim=20,
    encoder_hidden_size=8, vocab_size=12, codebook_size=10, in_channels=8, block_out_channels=8, num_res_blocks=1,
    block_num_heads=2, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, sample_size=4,
    downsample=True, upsample=True), dict(input_ids=ids(12, 4, 4), encoder_hidden_states=f(5, 8), pooled_text_emb=f(8),
    micro_conds=u(5, scale=100.0)))
add("DreamLiteUNetModel", dict(sample_size=8, down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D",
    "DreamLiteCrossAttnDownBlock2D"), up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
    block_out_channels=(16, 32), cross_attention_dim=8, attention_head_dim=8, layers_per_block=1, norm_num_groups=8),
    TEXT_TO_IMAGE)

# ---- ControlNets and adapters

CONTROL = {k: v for k, v in UNET_COND.items() if k not in ("up_block_types",
    "sample_size")} | dict(conditioning_embedding_out_channels=(4, 8))
add("ControlNetModel", CONTROL, TEXT_TO_IMAGE | dict(controlnet_cond=f(3, 16, 16)))
add("ControlNetModel, SDXL and pooled conditions", CONTROL | SDXL | dict(global_pool_conditions=True),
    TEXT_TO_IMAGE | SDXL_INPUTS | dict(controlnet_cond=f(3, 16, 16)))


def several(name: str, config: Mapping[str, Any], n: int = 2) -> Callable[[], nn.Module]:
    """Return a function that makes diffusers' wrapper of n ControlNets."""

    def make() -> nn.Module:
        import diffusers

        single = getattr(diffusers, name.replace("Multi", ""))
        wrapper = getattr(diffusers, name, None) or getattr(diffusers.models, name)
        return wrapper([single(**config) for _ in range(n)])

    return make


def twice(net: nn.Module, controlnet_cond: Tensor, other_cond: Tensor, **x: Any) -> Any:
    return net(controlnet_cond=[controlnet_cond, other_cond], conditioning_scale=[1.0, 0.5], return_dict=False, **x)


add("MultiControlNetModel", {}, TEXT_TO_IMAGE | dict(controlnet_cond=f(3, 16, 16), other_cond=f(3, 16, 16)),
    make=several("MultiControlNetModel", CONTROL), call=twice)
UNION = dict(num_trans_channel=8, num_trans_head=2, num_proj_channel=8, projection_class_embeddings_input_dim=48,
    addition_time_embed_dim=8)
add("ControlNetUnionModel", CONTROL | UNION, TEXT_TO_IMAGE | dict(cond=f(3, 16, 16), control_type=u(6)),
    call=lambda net, cond, **x: net(**x, controlnet_cond=[cond], control_type_idx=[1], return_dict=False))
add("ControlNetUnionModel, float32", CASES[-1].config, CASES[-1].inputs, call=CASES[-1].call, dtype=torch.float32)
add("MultiControlNetUnionModel", {}, TEXT_TO_IMAGE | dict(cond=f(3, 16, 16), other=f(3, 16, 16), control_type=u(6)),
    make=several("MultiControlNetUnionModel", CONTROL | UNION), call=lambda net, cond, other, control_type,
    **x: net(controlnet_cond=[[cond], [other]], control_type=[control_type, control_type], control_type_idx=[[1], [2]],
    conditioning_scale=[1.0, 0.5], return_dict=False, **x))
add("UNetControlNetXSModel", dict(sample_size=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(4, 8), cross_attention_dim=8,
    num_attention_heads=2, norm_num_groups=4, upcast_attention=False, ctrl_block_out_channels=[2, 4],
    ctrl_num_attention_heads=4, ctrl_max_norm_num_groups=2, ctrl_conditioning_embedding_out_channels=(2, 2)),
    TEXT_TO_IMAGE | dict(controlnet_cond=f(3, 16, 16)))
SPARSE = UNET | dict(cross_attention_dim=8, attention_head_dim=2, motion_num_attention_heads=2,
    conditioning_channels=3, down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
    conditioning_embedding_out_channels=(4, 8), use_simplified_condition_embedding=False,
    concat_conditioning_mask=False)
del SPARSE["sample_size"]
add("SparseControlNetModel", SPARSE, dict(sample=f(4, 3, 8, 8), timestep=T, encoder_hidden_states=f(5, 8),
    controlnet_cond=f(3, 3, 16, 16)), call=per_frame)
FLUX = dict(patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
    num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=[4, 4, 8])
TOKENS = dict(hidden_states=f(16, 4), encoder_hidden_states=f(5, 8), timestep=u())
POSITIONS = dict(img_ids=IDS, txt_ids=TEXT_IDS)
FLUX_INPUTS = TOKENS | dict(pooled_projections=f(8), guidance=u(scale=4.0))
FLUX_GUIDED = FLUX | dict(guidance_embeds=True)
add("FluxControlNetModel", FLUX_GUIDED, FLUX_INPUTS | dict(controlnet_cond=f(16, 4)), shared=POSITIONS)
add("FluxControlNetModel, union", FLUX_GUIDED | dict(num_mode=3), FLUX_INPUTS | dict(controlnet_cond=f(16, 4),
    controlnet_mode=ids(3, 1)), shared=POSITIONS)
add("FluxMultiControlNetModel", {}, FLUX_INPUTS | dict(mode=ids(3), controlnet_cond=f(16, 4), other_cond=f(16, 4)),
    shared=POSITIONS, make=several("FluxMultiControlNetModel", FLUX_GUIDED | dict(num_mode=3)), call=lambda net, mode,
    **x: twice(net, controlnet_mode=[mode, mode], **x))
HUNYUAN_DIT = dict(sample_size=8, patch_size=2, in_channels=4, attention_head_dim=8, num_attention_heads=2,
    cross_attention_dim=8, cross_attention_dim_t5=8, pooled_projection_dim=4, hidden_size=16, text_len=4,
    text_len_t5=4)
HUNYUAN_DIT_INPUTS = dict(hidden_states=f(4, 8, 8), timestep=T, encoder_hidden_states=f(4, 8),
    text_embedding_mask=mask(4, None), encoder_hidden_states_t5=f(4, 8), text_embedding_mask_t5=mask(4, None),
    image_meta_size=u(6, scale=100.0), style=ids(1))
ROPE = dict(image_rotary_emb=[torch.ones(1, 8, dtype=torch.float64), torch.zeros(1, 8, dtype=torch.float64)])
add("HunyuanDiT2DControlNetModel", HUNYUAN_DIT | dict(transformer_num_layers=4),
    HUNYUAN_DIT_INPUTS | dict(controlnet_cond=f(4, 8, 8)), shared=ROPE)
add("HunyuanDiT2DMultiControlNetModel", {}, HUNYUAN_DIT_INPUTS | dict(controlnet_cond=f(4, 8, 8),
    other_cond=f(4, 8, 8)), shared=ROPE, make=several("HunyuanDiT2DMultiControlNetModel",
    HUNYUAN_DIT | dict(transformer_num_layers=4)), call=twice)
QWEN = dict(patch_size=2, in_channels=8, out_channels=2, num_layers=2, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=8, axes_dims_rope=(8, 4, 4))
QWEN_INPUTS = dict(hidden_states=f(16, 8), encoder_hidden_states=f(5, 8),
    encoder_hidden_states_mask=mask(5, torch.int64), timestep=u())


def qwen(net: nn.Module, **x: Any) -> Any:
    return net(img_shapes=[[(1, 4, 4)]] * len(x["timestep"]), return_dict=False, **x)


add("QwenImageControlNetModel", QWEN, QWEN_INPUTS | dict(controlnet_cond=f(16, 8)), call=qwen)
add("QwenImageMultiControlNetModel", {}, QWEN_INPUTS | dict(cond=f(16, 8), other=f(16, 8)),
    make=several("QwenImageMultiControlNetModel", QWEN, 1), call=lambda net, cond, other,
    **x: qwen(net, controlnet_cond=[cond, other], conditioning_scale=[1.0, 0.5], **x))
SANA = dict(patch_size=1, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2,
    num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8, sample_size=8)
CAPTIONED = dict(hidden_states=f(4, 8, 8), encoder_hidden_states=f(5, 8), timestep=T)
add("SanaControlNetModel", SANA, CAPTIONED | dict(controlnet_cond=f(4, 8, 8),
    encoder_attention_mask=mask(5, torch.int64)))
SD3 = dict(sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
    caption_projection_dim=16, joint_attention_dim=8, pooled_projection_dim=8, out_channels=4, pos_embed_max_size=8)
SD3_INPUTS = CAPTIONED | dict(pooled_projections=f(8))
add("SD3ControlNetModel", SD3, SD3_INPUTS | dict(controlnet_cond=f(4, 8, 8)))
add("SD3MultiControlNetModel", {}, SD3_INPUTS | dict(controlnet_cond=f(4, 8, 8), other_cond=f(4, 8, 8)),
    make=several("SD3MultiControlNetModel", SD3), call=twice)
add("T2IAdapter", dict(channels=[4, 8, 8, 8], num_res_blocks=1, downscale_factor=2), dict(x=f(3, 32, 32)))
add("T2IAdapter, SDXL", dict(channels=[4, 8, 8, 8], num_res_blocks=1, downscale_factor=2,
    adapter_type="full_adapter_xl"), dict(x=f(3, 32, 32)))
add("T2IAdapter, light", dict(channels=[4, 8, 8, 8], num_res_blocks=1, downscale_factor=2,
    adapter_type="light_adapter"), dict(x=f(3, 32, 32)))


def adapters() -> nn.Module:
    from diffusers import MultiAdapter, T2IAdapter

    return MultiAdapter([T2IAdapter(channels=[4, 8, 8, 8], num_res_blocks=1, downscale_factor=2) for _ in range(2)])


add("MultiAdapter", {}, dict(x=f(3, 32, 32), y=f(3, 32, 32)), make=adapters, call=lambda net, x,
    y: net([x, y], [1.0, 0.5]))

# ---- transformers

VIDEO = dict(hidden_states=f(4, 2, 8, 8), timestep=T, encoder_hidden_states=f(5, 8))
ADA = dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
    patch_size=2)
add("AceStepTransformer1DModel", dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, in_channels=12, audio_acoustic_hidden_dim=4, sliding_window=4),
    dict(hidden_states=f(8, 4), timestep=u(), timestep_r=u(), encoder_hidden_states=f(5, 16), context_latents=f(8, 8)))
add("AuraFlowTransformer2DModel", dict(sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1,
    attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=16,
    pos_embed_max_size=16), CAPTIONED)
COGVIDEO = dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=8,
    text_embed_dim=8, num_layers=2, sample_width=8, sample_height=8, sample_frames=8, max_text_seq_length=5)
COGVIDEO_INPUTS = dict(hidden_states=f(2, 4, 8, 8), timestep=T, encoder_hidden_states=f(5, 8))
add("CogVideoXTransformer3DModel", COGVIDEO, COGVIDEO_INPUTS)
add("CogVideoXTransformer3DModel, 1.5", COGVIDEO | dict(patch_size_t=2, use_rotary_positional_embeddings=True,
    ofs_embed_dim=8, patch_bias=False), COGVIDEO_INPUTS | dict(ofs=u(scale=3.0)),
    shared=dict(image_rotary_emb=(torch.ones(16, 8).double(), torch.zeros(16, 8).double())))
add("ConsisIDTransformer3DModel", COGVIDEO | dict(is_train_face=True, cross_attn_interval=1, cross_attn_dim_head=4,
    cross_attn_num_heads=2, LFE_id_dim=4, LFE_vit_dim=4, LFE_depth=2, LFE_dim_head=4, LFE_num_heads=2,
    LFE_num_id_token=2, LFE_num_querie=2, LFE_output_dim=10, LFE_ff_mult=1, LFE_num_scale=1),
    COGVIDEO_INPUTS | dict(id_cond=f(4), vit=f(3, 4)), call=lambda net, vit,
    **x: net(id_vit_hidden=[vit], return_dict=False, **x))
add("DiTTransformer2DModel", ADA | dict(norm_num_groups=4, num_embeds_ada_norm=10),
    dict(hidden_states=f(4, 8, 8), timestep=T, class_labels=ids(10)))
add("HunyuanDiT2DModel", HUNYUAN_DIT | dict(num_layers=2), HUNYUAN_DIT_INPUTS, shared=ROPE)
add("HunyuanDiT2DModel, no style", HUNYUAN_DIT | dict(num_layers=2, use_style_cond_and_image_meta_size=False),
    {k: v for k, v in HUNYUAN_DIT_INPUTS.items() if k not in ("image_meta_size", "style")}, shared=ROPE)
add("HunyuanDiT2DModel, float32 and as many tokens as divide by the batch",
    HUNYUAN_DIT | dict(num_layers=2, text_len_t5=29), HUNYUAN_DIT_INPUTS | dict(encoder_hidden_states_t5=f(29, 8),
    text_embedding_mask_t5=mask(29, None)), shared=ROPE, dtype=torch.float32)
add("LatteTransformer3DModel", ADA | dict(caption_channels=8, cross_attention_dim=16, attention_bias=True,
    activation_fn="gelu-approximate", norm_type="ada_norm_single", num_embeds_ada_norm=1000,
    norm_elementwise_affine=False, video_length=2), VIDEO)
add("LuminaNextDiT2DModel", dict(sample_size=8, hidden_size=24, num_layers=2, num_attention_heads=3, num_kv_heads=1,
    multiple_of=16, learn_sigma=False, cross_attention_dim=8), dict(hidden_states=f(4, 8, 8), timestep=u(),
    encoder_hidden_states=f(5, 8), encoder_mask=mask(5)), shared=dict(image_rotary_emb=torch.polar(torch.ones(384, 384,
    4), torch.rand(384, 384, 4, generator=torch.Generator().manual_seed(0))), cross_attention_kwargs={}))
PIXART = ADA | dict(cross_attention_dim=16, caption_channels=8)
PIXART_INPUTS = CAPTIONED | dict(encoder_attention_mask=mask(5, None))
add("PixArtTransformer2DModel", PIXART, PIXART_INPUTS, shared=dict(added_cond_kwargs=dict(resolution=None,
    aspect_ratio=None)))
add("PixArtTransformer2DModel, resolutions", PIXART | dict(use_additional_conditions=True, attention_head_dim=12,
    cross_attention_dim=24), PIXART_INPUTS | {"added_cond_kwargs.resolution": u(2, scale=9.0),
    "added_cond_kwargs.aspect_ratio": u(1)})
PRIOR = dict(num_attention_heads=2, attention_head_dim=4, num_layers=2, embedding_dim=8, num_embeddings=5)
PRIOR_INPUTS = dict(hidden_states=f(8), timestep=T, proj_embedding=f(8), encoder_hidden_states=f(5, 8))
add("PriorTransformer", PRIOR, PRIOR_INPUTS | dict(attention_mask=mask(5)))
add("PriorTransformer, Shap-E", PRIOR | dict(additional_embeddings=0, time_embed_act_fn="gelu", norm_in_type="layer",
    embedding_proj_norm_type=None, encoder_hid_proj_type=None, added_emb_type=None, time_embed_dim=16,
    embedding_proj_dim=8, clip_embed_dim=8), dict(hidden_states=f(5, 8), timestep=T, proj_embedding=f(8)))
add("SanaTransformer2DModel", SANA, CAPTIONED | dict(encoder_attention_mask=mask(5, torch.int64)))
add("SanaTransformer2DModel, Sprint", SANA | dict(guidance_embeds=True, qk_norm="rms_norm_across_heads"),
    CAPTIONED | dict(guidance=u(scale=4.0)))
add("StableAudioDiTModel", dict(sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
    num_attention_heads=2, num_key_value_attention_heads=1, cross_attention_dim=8, time_proj_dim=8,
    global_states_input_dim=8, cross_attention_input_dim=8), dict(hidden_states=f(4, 8), timestep=u(),
    encoder_hidden_states=f(5, 8), global_hidden_states=f(1, 8)), shared=dict(rotary_embedding=(torch.ones(9,
    4).double(), torch.zeros(9, 4).double())))
add("T5FilmDecoder", dict(input_dims=4, targets_length=8, d_model=16, num_layers=2, num_heads=2, d_kv=8, d_ff=16),
    dict(a=f(5, 16), a_mask=mask(5, None), tokens=f(8, 4), noise_time=u()), call=lambda net, a, a_mask, tokens,
    noise_time: net([(a, a_mask)], tokens, noise_time))
add("Transformer2DModel, continuous", dict(num_attention_heads=2, attention_head_dim=8, in_channels=8,
    norm_num_groups=4, cross_attention_dim=8), dict(hidden_states=f(8, 4, 4), encoder_hidden_states=f(5, 8)))
add("Transformer2DModel, vectorized", dict(num_attention_heads=2, attention_head_dim=8, sample_size=4,
    num_vector_embeds=10, cross_attention_dim=8, num_layers=2), dict(hidden_states=ids(10, 16),
    encoder_hidden_states=f(5, 8)))
add("DreamLiteTransformer2DModel", dict(num_attention_heads=2, attention_head_dim=8, in_channels=16, norm_num_groups=4,
    cross_attention_dim=8), dict(hidden_states=f(16, 4, 4), encoder_hidden_states=f(5, 8)))
add("AllegroTransformer3DModel", dict(num_attention_heads=2, attention_head_dim=24, num_layers=2,
    cross_attention_dim=48, sample_width=8, sample_height=8, sample_frames=2, caption_channels=8),
    VIDEO | dict(encoder_attention_mask=mask(5, torch.int64)))
WAN = dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
    ffn_dim=16, num_layers=2, rope_max_seq_len=32)
ANYFLOW = dict(hidden_states=f(2, 4, 8, 8), timestep=u(2, scale=1000.0), r_timestep=u(2, scale=1000.0),
    encoder_hidden_states=f(5, 8))
add("AnyFlowTransformer3DModel", WAN, ANYFLOW)


def dense_flex_attention(query: Tensor, key: Tensor, value: Tensor, block_mask: Any = None, scale: float | None = None,
    **_: Any) -> Tensor:
    """Compute flex_attention with a dense mask, since torch has no backward of flex_attention on a CPU."""
    from torch.nn.attention.flex_attention import create_mask

    seen = None
    if block_mask is not None:
        rows, columns = query.shape[2], key.shape[2]
        seen = create_mask(block_mask.mask_mod, len(query), query.shape[1], rows, columns, device="cpu")
        blocks = block_mask.to_dense().bool()
        for dim, size in ((2, block_mask.BLOCK_SIZE[0]), (3, block_mask.BLOCK_SIZE[1])):
            blocks = blocks.repeat_interleave(size, dim)
        seen = seen & blocks[:, :, :rows, :columns]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale)


def dense_flex(net: nn.Module, **x: Any) -> Any:
    with unittest.mock.patch("torch.nn.attention.flex_attention.flex_attention", dense_flex_attention):
        return net(return_dict=False, **x)


add("AnyFlowFARTransformer3DModel", WAN | dict(attention_head_dim=24), ANYFLOW, shared=dict(chunk_partition=[1, 1]),
    call=dense_flex)
BRIA = dict(patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
    num_attention_heads=2, joint_attention_dim=8, axes_dims_rope=[0, 4, 4])
add("BriaTransformer2DModel", BRIA, TOKENS, shared=POSITIONS)
add("BriaFiboTransformer2DModel", BRIA | dict(text_encoder_dim=8, joint_attention_dim=16),
    dict(hidden_states=f(16, 4), encoder_hidden_states=f(5, 16), timestep=u(), a=f(5, 8), b=f(5, 8)), shared=POSITIONS,
    call=lambda net, a, b, **x: net(text_encoder_layers=[a, b], return_dict=False, **x))
FIBO2 = dict(in_channels=4, dim=24, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=8,
    injection_layer_ids=(1,), perceiver_num_layers=1, min_num_gist_tokens=2, max_num_gist_tokens=4, gist_step=1,
    gist_min_text_len=2, gist_max_text_len=6, axes_dims=(4, 4, 4), axes_lens=(64, 64, 64))
FIBO2_INPUTS = dict(hidden_states=f(4, 8, 8), timestep=u(), encoder_hidden_states=f(2, 5, 8))
add("BriaFibo2Transformer2DModel", FIBO2, FIBO2_INPUTS)
add("BriaFibo2Transformer2DModel, text masks", FIBO2, FIBO2_INPUTS | dict(encoder_attention_mask=mask(5)))
add("ChromaTransformer2DModel", dict(patch_size=1, in_channels=4, num_layers=1, num_single_layers=1,
    attention_head_dim=16, num_attention_heads=2, joint_attention_dim=8, axes_dims_rope=(4, 4, 8),
    approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1),
    TOKENS | dict(attention_mask=mask(21)), shared=POSITIONS)
WAN_INPUTS = VIDEO
add("ChronoEditTransformer3DModel", WAN, WAN_INPUTS)
SIZES = dict(original_size=u(2, scale=64.0), target_size=u(2, scale=64.0), crop_coords=u(2, scale=8.0))
COGVIEW = dict(in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, out_channels=4,
    text_embed_dim=8, time_embed_dim=8, condition_dim=4, pos_embed_max_size=8, sample_size=8)
add("CogView3PlusTransformer2DModel", COGVIEW, CAPTIONED | SIZES)
add("CogView4Transformer2DModel", COGVIEW | dict(rope_axes_dim=(8, 8)), CAPTIONED | SIZES)
COSMOS = dict(concat_padding_mask=False, in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12,
    num_layers=2, mlp_ratio=2, text_embed_dim=8, adaln_lora_dim=4, max_size=(4, 8, 8))
COSMOS_SHARED = dict(fps=30)
add("CosmosTransformer3DModel", COSMOS, dict(hidden_states=f(4, 1, 8, 8), timestep=u(), encoder_hidden_states=f(5, 8),
    attention_mask=mask(5)), shared=COSMOS_SHARED, dtype=torch.float32)
add("CosmosTransformer3DModel, video to world", COSMOS | dict(in_channels=5),
    dict(hidden_states=f(4, 1, 8, 8), timestep=u(), encoder_hidden_states=f(5, 8),
    condition_mask=const(torch.ones(1, 1, 8, 8))), shared=COSMOS_SHARED, dtype=torch.float32)


def cosmos_control(net: nn.Module, text: Tensor, image: Tensor, **x: Any) -> Any:
    """Call the ControlNet, which resizes a padding mask with torchvision, with a resize that changes nothing."""
    from diffusers.models.controlnets import controlnet_cosmos

    same = types.SimpleNamespace(functional=types.SimpleNamespace(resize=lambda mask, size, **_: mask),
        InterpolationMode=types.SimpleNamespace(NEAREST=None))
    with unittest.mock.patch.object(controlnet_cosmos, "transforms", same, create=True):
        return net(encoder_hidden_states=(text, image), return_dict=False, **x)


def cosmos3(net: nn.Module, video: Tensor, text: Tensor, timestep: Tensor) -> Any:
    """Call the model for each sample, since it reads one packed sequence without a batch dimension."""
    n, (height, width) = text.shape[1], video.shape[-2:]
    length = n + height * width
    image = torch.arange(n, length)
    outputs = []
    for v, tokens, t in zip(video, text, timestep, strict=True):
        outputs.append(net(
            input_ids=tokens, vision_tokens=[v[None]], vision_timesteps=t.expand(height * width),
            text_indexes=torch.arange(n), position_ids=torch.arange(length).expand(3, length), und_len=n,
            sequence_length=length, vision_token_shapes=[(1, height, width)], vision_sequence_indexes=image,
            vision_mse_loss_indexes=image, vision_noisy_frame_indexes=[torch.tensor([0])], return_dict=False,
        ))
    return [torch.stack(x) for x in zip(*(list(tensors(o)) for o in outputs), strict=True)]


add("Cosmos3OmniTransformer", dict(head_dim=6, hidden_size=12, intermediate_size=16, latent_channel=2,
    latent_patch_size=1, num_attention_heads=2, num_hidden_layers=2, num_key_value_heads=1, patch_latent_dim=2,
    rope_axes_dim=[1, 1, 1], vocab_size=10), dict(video=f(2, 1, 2, 2), text=ids(10, 3), timestep=T), call=cosmos3)
add("Cosmos3OmniTransformer, as many tokens as samples", CASES[-1].config,
    dict(video=f(2, 1, 2, 3), text=ids(10, 6), timestep=T), call=cosmos3)
add("CosmosControlNetModel", dict(n_controlnet_blocks=2, in_channels=6, latent_channels=6, model_channels=32,
    num_attention_heads=2, attention_head_dim=16, mlp_ratio=2.0, text_embed_dim=32, adaln_lora_dim=4,
    max_size=(4, 8, 8), img_context_dim_in=8, img_context_dim_out=32), dict(controls_latents=f(4, 1, 8, 8),
    latents=f(4, 1, 8, 8), timestep=u(), text=f(5, 32), image=f(3, 8), condition_mask=const(torch.ones(1, 1, 8, 8))),
    shared=dict(padding_mask=torch.zeros(1, 1, 8, 8).double()), call=cosmos_control)
add("EasyAnimateTransformer3DModel", dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
    patch_size=2, sample_width=90, sample_height=60, num_layers=2, mmdit_layers=1, time_embed_dim=8, text_embed_dim=8),
    VIDEO)
add("ErnieImageTransformer2DModel", dict(hidden_size=16, num_attention_heads=1, num_layers=2, ffn_hidden_size=16,
    in_channels=4, out_channels=4, text_in_dim=8, rope_axes_dim=(8, 4, 4)),
    dict(hidden_states=f(4, 4, 4), timestep=u(), text_bth=f(5, 8), text_lens=const(5, torch.int64)))
add("ErnieImageTransformer2DModel, as many tokens as divide by the batch", CASES[-1].config,
    CASES[-1].inputs | dict(text_bth=f(14, 8), text_lens=const(14, torch.int64)))
add("FluxTransformer2DModel", FLUX_GUIDED, FLUX_INPUTS, shared=POSITIONS)
IDS4, TEXT_IDS4 = (torch.cat([IDS, torch.zeros(16, 1).double()], 1), torch.zeros(5, 4).double())
FLUX2 = dict(in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=8, axes_dims_rope=(4, 4, 4, 4))
add("Flux2Transformer2DModel", FLUX2 | dict(timestep_guidance_channels=16), TOKENS | dict(guidance=u(scale=4.0)),
    shared=dict(img_ids=IDS4, txt_ids=TEXT_IDS4))
FLUX3 = FLUX2 | dict(timestep_channels=16, cond_in_channels=4)
add("Flux3Transformer2DModel", FLUX3, TOKENS | dict(image_cond_hidden_states=f(16, 4)),
    shared=dict(img_ids=IDS4, txt_ids=TEXT_IDS4, image_cond_ids=IDS4))
add("Flux3Transformer2DModel, flow map", FLUX3 | dict(flow_map=True), TOKENS | dict(target_timestep=u(),
    image_cond_hidden_states=f(16, 4)), shared=dict(img_ids=IDS4, txt_ids=TEXT_IDS4, image_cond_ids=IDS4))
add("GlmImageTransformer2DModel", dict(in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
    num_attention_heads=2, text_embed_dim=8, time_embed_dim=8, condition_dim=4, prior_vq_quantizer_codebook_size=10),
    CAPTIONED | dict(prior_token_id=ids(10, 16), prior_token_drop=lambda n, g,
    d: torch.arange(n)[:, None].expand(n, 16) % 3 == 0, target_size=u(2, scale=64.0), crop_coords=u(2, scale=8.0)))
add("HeliosTransformer3DModel", {k: v for k, v in WAN.items() if k != "rope_max_seq_len"} | dict(rope_dim=(4, 4, 4)),
    dict(hidden_states=f(4, 2, 8, 8), timestep=T, encoder_hidden_states=f(5, 8),
    indices_hidden_states=const(torch.ones(2)), indices_latents_history_short=const(torch.ones(1)),
    indices_latents_history_mid=const(torch.ones(1)), indices_latents_history_long=const(torch.ones(4)),
    latents_history_short=f(4, 1, 8, 8), latents_history_mid=f(4, 1, 8, 8), latents_history_long=f(4, 4, 8, 8)))
HIDREAM = dict(patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
    num_attention_heads=2, caption_channels=[8, 4], text_emb_dim=8, num_routed_experts=4, num_activated_experts=2,
    axes_dims_rope=(4, 2, 2), max_resolution=(8, 8), llama_layers=(0, 1))


def hidream(net: nn.Module, llama: Tensor, **x: Any) -> Any:
    return net(encoder_hidden_states_llama3=llama.transpose(0, 1), return_dict=False, **x)


HIDREAM_INPUTS = dict(hidden_states=f(4, 8, 8), timesteps=T, encoder_hidden_states_t5=f(5, 8), llama=f(2, 5, 4),
    pooled_embeds=f(8))
add("HiDreamImageTransformer2DModel", HIDREAM, HIDREAM_INPUTS, call=hidream, train=True)
add("HiDreamImageTransformer2DModel, as many experts as activated", HIDREAM | dict(num_routed_experts=2),
    HIDREAM_INPUTS, call=hidream, train=True)
HUNYUAN = dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1,
    num_single_layers=1, num_refiner_layers=1, patch_size=1, text_embed_dim=8, pooled_projection_dim=8,
    rope_axes_dim=(2, 4, 4))
HUNYUAN_INPUTS = dict(hidden_states=f(4, 1, 4, 4), timestep=T, encoder_hidden_states=f(5, 8),
    encoder_attention_mask=mask(5), pooled_projections=f(8), guidance=T)
add("HunyuanVideoTransformer3DModel", HUNYUAN, HUNYUAN_INPUTS)
UNGUIDED = {k: v for k, v in HUNYUAN_INPUTS.items() if k != "guidance"}
add("HunyuanVideoTransformer3DModel, image to video", HUNYUAN | dict(in_channels=9, guidance_embeds=False,
    image_condition_type="latent_concat"), UNGUIDED | dict(hidden_states=f(9, 1, 4, 4)))
add("HunyuanVideoTransformer3DModel, token replace", HUNYUAN | dict(image_condition_type="token_replace"),
    HUNYUAN_INPUTS | dict(hidden_states=f(4, 2, 4, 4)))
add("HunyuanVideo15Transformer3DModel", dict(in_channels=4, out_channels=4, num_attention_heads=2,
    attention_head_dim=8, num_layers=2, num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=8, text_embed_2_dim=8,
    image_embed_dim=8, rope_axes_dim=(2, 2, 4), target_size=16), dict(hidden_states=f(4, 1, 4, 4), timestep=T,
    encoder_hidden_states=f(5, 8), encoder_attention_mask=mask(5), encoder_hidden_states_2=f(4, 8),
    encoder_attention_mask_2=mask(4), image_embeds=f(3, 8)))
add("HunyuanVideo15Transformer3DModel, text to video", dict(in_channels=4, out_channels=4, num_attention_heads=2,
    attention_head_dim=8, num_layers=2, num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=8, text_embed_2_dim=8,
    image_embed_dim=8, rope_axes_dim=(2, 2, 4), target_size=16, task_type="t2v", use_meanflow=True),
    dict(hidden_states=f(4, 1, 4, 4), timestep=T, timestep_r=T, encoder_hidden_states=f(5, 8),
    encoder_attention_mask=full(5), encoder_hidden_states_2=f(4, 8), encoder_attention_mask_2=full(4),
    image_embeds=lambda n, g, d: torch.zeros(n, 3, 8, dtype=d)))
FRAMEPACK_SHARED = dict(indices_latents=torch.arange(3).double(), indices_latents_clean=torch.arange(2).double(),
    indices_latents_history_2x=torch.arange(2).double(), indices_latents_history_4x=torch.arange(8).double())
add("HunyuanVideoFramepackTransformer3DModel", HUNYUAN | dict(patch_size=2, has_image_proj=True, image_proj_dim=8,
    has_clean_x_embedder=True), HUNYUAN_INPUTS | dict(hidden_states=f(4, 3, 4, 4), image_embeds=f(3, 8),
    latents_clean=f(4, 2, 4, 4), latents_history_2x=f(4, 2, 4, 4), latents_history_4x=f(4, 8, 4, 4)),
    shared=FRAMEPACK_SHARED)
HUNYUAN_IMAGE = dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
    num_single_layers=1, num_refiner_layers=1, text_embed_dim=8, rope_axes_dim=(4, 4))
HUNYUAN_IMAGE_INPUTS = dict(hidden_states=f(4, 4, 4), timestep=T, encoder_hidden_states=f(5, 8),
    encoder_attention_mask=mask(5))
add("HunyuanImageTransformer2DModel", HUNYUAN_IMAGE, HUNYUAN_IMAGE_INPUTS)
add("HunyuanImageTransformer2DModel, two texts", HUNYUAN_IMAGE | dict(text_embed_2_dim=8, guidance_embeds=True,
    use_meanflow=True), HUNYUAN_IMAGE_INPUTS | dict(encoder_hidden_states_2=f(4, 8), encoder_attention_mask_2=mask(4),
    guidance=T, timestep_r=T))
add("Ideogram4Transformer2DModel", dict(in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
    intermediate_size=16, adaln_dim=8, llm_features_dim=12, rope_theta=10000, mrope_section=(2, 1, 1)),
    dict(hidden_states=f(9, 4), timestep=u(), encoder_hidden_states=f(9, 12),
    position_ids=const(torch.arange(9)[:, None].expand(9, 3), torch.int64),
    segment_ids=const(torch.ones(9), torch.int64), indicator=const([3] * 5 + [2] * 4, torch.int64)))
JOY = dict(in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=8, num_layers=2, rope_dim_list=[4, 6, 6])
add("JoyImageEditTransformer3DModel", JOY, dict(hidden_states=f(4, 1, 4, 4), timestep=T,
    encoder_hidden_states=f(5, 8)))
add("JoyImageEditPlusTransformer3DModel", JOY, dict(hidden_states=f(2, 4, 1, 2, 2), timestep=T,
    encoder_hidden_states=f(5, 8)), call=lambda net, **x: net(shape_list=[[(1, 1, 1), (1, 1, 1)]] * len(x["timestep"]),
    return_dict=False, **x))
KANDINSKY = dict(in_visual_dim=4, in_text_dim=8, in_text_dim2=8, time_dim=8, out_visual_dim=4, model_dim=16, ff_dim=16,
    num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 2, 2))
add("Kandinsky5Transformer3DModel", KANDINSKY, dict(hidden_states=f(2, 4, 4, 4), timestep=T,
    encoder_hidden_states=f(5, 8), pooled_projections=f(8)), shared=dict(visual_rope_pos=[torch.arange(2),
    torch.arange(2), torch.arange(2)], text_rope_pos=torch.arange(5)), dtype=torch.float32)
add("Kandinsky6Transformer3DModel", KANDINSKY | dict(visual_cond=False, in_audio_dim=4, out_audio_dim=4),
    dict(hidden_states=f(2, 4, 4, 4), timestep=T, encoder_hidden_states=f(5, 8), pooled_projections=f(8),
    audio_hidden_states=f(7, 4), encoder_attention_mask=mask(5)))
add("Kandinsky6Transformer3DModel, cross gates", KANDINSKY | dict(visual_cond=False, in_audio_dim=4, out_audio_dim=4,
    ca_rope=True, cross_gates=True, fix_modulation=True, visual_token_type_num_embeddings=2),
    dict(hidden_states=f(2, 4, 4, 4), timestep=T, encoder_hidden_states=f(5, 8), pooled_projections=f(8),
    audio_hidden_states=f(7, 4), visual_token_type_ids=ids(2, 2)))
add("Kandinsky6SRTransformer3DModel", dict(in_visual_dim=4, out_visual_dim=4, time_dim=8, model_dim=32, ff_dim=16,
    num_visual_blocks=1, axes_dims=(8, 4, 4)), dict(hidden_states=f(1, 8, 8, 9), timestep=T), call=dense_flex)
add("Krea2Transformer2DModel", dict(in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=16, timestep_embed_dim=8, text_hidden_dim=8, num_text_layers=3,
    text_num_attention_heads=2, text_num_key_value_heads=1, text_intermediate_size=16, num_layerwise_text_blocks=1,
    num_refiner_text_blocks=1, axes_dims_rope=(4, 2, 2)), dict(hidden_states=f(16, 4), timestep=u(),
    encoder_hidden_states=f(5, 3, 8), encoder_attention_mask=mask(5)), shared=dict(position_ids=torch.cat([TEXT_IDS,
    IDS])))
add("LongCatAudioDiTTransformer", dict(dit_dim=16, dit_depth=2, dit_heads=2, dit_text_dim=8, latent_dim=4),
    dict(hidden_states=f(8, 4), timestep=u(), encoder_hidden_states=f(5, 8), encoder_attention_mask=mask(5),
    attention_mask=mask(8), latent_cond=f(8, 4)))
add("LongCatImageTransformer2DModel", FLUX, TOKENS, shared=POSITIONS)
add("LTXVideoTransformer3DModel", dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
    cross_attention_dim=16, num_layers=2, caption_channels=8), dict(hidden_states=f(16, 4), timestep=T,
    encoder_hidden_states=f(5, 8), encoder_attention_mask=mask(5, torch.int64)),
    shared=dict(num_frames=1, height=4, width=4))
LTX2 = dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
    audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
    audio_cross_attention_dim=8, num_layers=2, caption_channels=8)
LTX2_INPUTS = dict(hidden_states=f(16, 4), audio_hidden_states=f(7, 4), encoder_hidden_states=f(5, 8),
    audio_encoder_hidden_states=f(5, 8), timestep=T, encoder_attention_mask=mask(5, torch.int64),
    audio_encoder_attention_mask=mask(5, torch.int64))
LTX2_SHARED = dict(num_frames=1, height=4, width=4, audio_num_frames=7)
add("LTX2VideoTransformer3DModel", LTX2, LTX2_INPUTS, shared=LTX2_SHARED)
add("LTX2VideoTransformer3DModel, gated", LTX2 | dict(gated_attn=True, audio_gated_attn=True, cross_attn_mod=True,
    audio_cross_attn_mod=True), LTX2_INPUTS | dict(sigma=u()), shared=LTX2_SHARED)
add("Lumina2Transformer2DModel", dict(sample_size=8, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
    num_attention_heads=3, num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(32, 32, 32),
    cap_feat_dim=8), dict(hidden_states=f(4, 8, 8), timestep=u(), encoder_hidden_states=f(5, 8),
    encoder_attention_mask=full(5)))
add("Lumina2Transformer2DModel, captions of several lengths", CASES[-1].config,
    CASES[-1].inputs | dict(encoder_attention_mask=mask(5)))
H3 = dict(num_attention_heads=2, attention_head_dim=16, hidden_size=24, num_layers=2, num_refiner_layers=1, ffn_dim=16,
    in_channels=4, audio_in_channels=4, text_dim=8, freq_dim=8, time_embed_hidden_dim=16, time_embed_dim=16,
    rope_freq_dim=2)
TAGS = torch.tensor([1] * 5 + [2] * 4 + [0] * 8)
add("MiniMaxH3Transformer3DModel", H3, dict(hidden_states=f(8, 16), audio_hidden_states=f(4, 4),
    encoder_hidden_states=f(5, 8)), shared=dict(timestep=torch.tensor([0.7, 0.3]).double(),
    timestep_indices=(TAGS == 2).long(), token_tags=TAGS, position_ids=torch.arange(17).double()[:, None].repeat(1, 3),
    video_indices=torch.arange(9, 17), audio_indices=torch.arange(5, 9), text_indices=torch.arange(5)))
add("MiniMaxH3Transformer3DModel, as many timesteps as samples", H3, CASES[-1].inputs,
    shared=CASES[-1].shared | dict(timestep=torch.linspace(0.2, 0.7, 6).double(),
    timestep_indices=torch.arange(17) % 6))
add("MiniMaxMusic3Transformer1DModel", dict(in_channels=4, condition_dim=8, num_layers=2, num_attention_heads=2,
    attention_head_dim=8, ff_inner_dim=16, rotary_dim=4, fourier_embedding_dim=8),
    dict(hidden_states=f(4, 8), timestep=u(), encoder_hidden_states=f(8, 8)))
add("MochiTransformer3DModel", dict(num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=8,
    in_channels=4, text_embed_dim=8, time_embed_dim=8, max_sequence_length=5),
    VIDEO | dict(encoder_attention_mask=mask(5)))
add("MotifVideoTransformer3DModel", dict(in_channels=5, out_channels=4, num_attention_heads=2, attention_head_dim=12,
    num_layers=1, num_single_layers=1, num_decoder_layers=1, patch_size=1, text_embed_dim=8, image_embed_dim=8,
    rope_axes_dim=(4, 4, 4)), dict(hidden_states=f(5, 2, 4, 4), timestep=T, encoder_hidden_states=f(5, 8),
    encoder_attention_mask=mask(5), image_embeds=f(3, 8)), dtype=torch.float32)
add("MotifVideoTransformer3DModel, text cross-attention",
    CASES[-1].config | dict(enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True,
    image_embed_dim=None), dict(hidden_states=f(5, 2, 4, 4), timestep=T, encoder_hidden_states=f(5, 8)),
    dtype=torch.float32)
NUCLEUS = {k: v for k, v in QWEN.items()} | dict(num_layers=2, capacity_factors=[2.0, 2.0], num_experts=4,
    moe_intermediate_dim=8)
add("NucleusMoEImageTransformer2DModel", NUCLEUS | dict(dense_moe_strategy="all_moe"), QWEN_INPUTS, call=lambda net,
    **x: net(img_shapes=[(1, 4, 4)] * len(x["timestep"]), return_dict=False, **x))
add("NucleusMoEImageTransformer2DModel, dense", NUCLEUS | dict(moe_enabled=False, num_attention_heads=3), QWEN_INPUTS,
    call=lambda net, **x: net(img_shapes=[(1, 4, 4)] * len(x["timestep"]), return_dict=False, **x))
add("NucleusMoEImageTransformer2DModel, grouped_mm", NUCLEUS | dict(dense_moe_strategy="all_moe", use_grouped_mm=True),
    QWEN_INPUTS, call=lambda net, **x: net(img_shapes=[(1, 4, 4)] * len(x["timestep"]), return_dict=False, **x),
    dtype=torch.float32)
OMNIGEN = dict(in_channels=4, hidden_size=16, num_attention_heads=2, num_key_value_heads=2, intermediate_size=16,
    num_layers=2, pad_token_id=0, vocab_size=10, time_step_dim=8, rope_scaling=dict(long_factor=[1, 2, 3, 4],
    short_factor=[1, 2, 3, 4]), pos_embed_max_size=8)
add("OmniGenTransformer2DModel", OMNIGEN, dict(hidden_states=f(4, 8, 8), timestep=u(), input_ids=ids(10, 7),
    image=f(4, 4, 4)), shared=dict(attention_mask=torch.ones(1, 24, 24).double(), position_ids=torch.arange(24)[None]),
    call=lambda net, image, attention_mask, position_ids, **x: net(input_img_latents=list(image[:, None].unbind()),
    input_image_sizes={i: [[1, 5]] for i in range(len(image))}, attention_mask=attention_mask.expand(len(image), -1,
    -1), position_ids=position_ids.expand(len(image), -1), return_dict=False, **x))
add("OvisImageTransformer2DModel",
    {k: v for k, v in FLUX.items() if k != "pooled_projection_dim"} | dict(out_channels=4), TOKENS, shared=POSITIONS)
add("PRXTransformer2DModel", dict(in_channels=4, context_in_dim=8, hidden_size=16, num_heads=2, depth=2,
    axes_dim=[4, 4]), dict(hidden_states=f(4, 8, 8), timestep=u(), encoder_hidden_states=f(5, 8),
    attention_mask=mask(5)))
add("QwenImageTransformer2DModel", QWEN, QWEN_INPUTS, call=qwen)
add("QwenImageTransformer2DModel, t = 0 for the condition", QWEN | dict(zero_cond_t=True),
    QWEN_INPUTS | dict(hidden_states=f(32, 8)), call=lambda net, **x: net(img_shapes=[[(1, 4, 4),
    (1, 4, 4)]] * len(x["timestep"]), return_dict=False, **x))
QWEN21 = dict(in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
    context_in_dim=8, axes_dims_rope=(8, 4, 4))
QWEN21_INPUTS = dict(hidden_states=f(16, 4), encoder_hidden_states=f(5, 8), timestep=u(),
    encoder_hidden_states_mask=mask(5))


def qwen21(net: nn.Module, **x: Any) -> Any:
    n = len(x["timestep"])
    img_mask = (torch.arange(9) >= 5).expand(n, 9)
    return net(img_shapes=[[(1, 4, 4)]] * n, img_mask=img_mask, return_dict=False, **x)


add("QwenImage21Transformer2DModel", QWEN21, QWEN21_INPUTS, call=qwen21)
add("QwenImage21Transformer2DModel, not causal", QWEN21 | dict(causal_condition=False), QWEN21_INPUTS, call=qwen21)
PROTEIN = dict(nlayers=2, token_dim=16, nheads=2, dim_cond=8, pair_repr_dim=8, latent_dim=4, token_type_emb_dim=4,
    t_emb_dim=8, seq_sep_dim=4, xt_pair_dist_dim=4, tri_mult_c=8, num_sequence_classes=5,
    feats_seq=("xt_bb_ca", "xt_local_latents", "token_type"), feats_cond_seq=("time_emb_bb_ca",
    "time_emb_local_latents"), feats_pair_repr=("xt_bb_ca_pair_dists",), update_pair_repr_every_n=1)
add("RFD4ProteinaTransformer", PROTEIN, {"bb_ca": f(7, 3), "local_latents": f(7, 4), "bb_ca_time": u(),
    "local_latents_time": u(), "padding_mask": mask(7), "token_type": ids(7, 7),
    "conditioning.is_in_context_conditioning": lambda n, g, d: torch.zeros(n, 7, dtype=torch.bool),
    "conditioning.supports_local_latent": full(7)})
add("SanaVideoTransformer3DModel", dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12,
    num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=8,
    sample_size=8, rope_max_seq_len=32), VIDEO | dict(encoder_attention_mask=mask(5, torch.int64)))


def camera(n: int, g: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Return cameras ``[n, 2, 20]``: a pose that is a shift, and the four numbers of a lens."""
    pose = torch.eye(4).expand(n, 2, 4, 4).clone()
    pose[..., :3, 3] = torch.rand(n, 2, 3, generator=g)
    return torch.cat([pose.flatten(2), torch.tensor([4.0, 4.0, 2.0, 2.0]).expand(n, 2, 4)], 2).to(dtype)


add("SanaWMTransformer3DModel", dict(in_channels=4, num_layers=2, hidden_size=32, num_attention_heads=2,
    softmax_every_n=2, linear_head_dim=16, chunk_plucker_channels=4, caption_channels=8, mlp_ratio=2.0),
    dict(hidden_states=f(4, 2, 4, 4), timestep=u(1, 2, scale=1000.0), encoder_hidden_states=f(1, 5, 8), mask=mask(5),
    camera_conditions=camera, chunk_plucker=f(4, 2, 4, 4)))
add("SanaWMLTX2RefinerTransformer3DModel", LTX2, dict(hidden_states=f(16, 4), encoder_hidden_states=f(5, 8),
    timestep=T, encoder_attention_mask=mask(5, torch.int64)), shared=dict(video_rotary_emb=(torch.ones(1, 16,
    16).double(), torch.zeros(1, 16, 16).double())))
add("SD3Transformer2DModel", SD3, SD3_INPUTS)
add("SD3Transformer2DModel, 3.5", SD3 | dict(dual_attention_layers=(0,), qk_norm="rms_norm"), SD3_INPUTS)
add("SkyReelsV2Transformer3DModel", WAN, WAN_INPUTS)
add("SkyReelsV2Transformer3DModel, fps", WAN | dict(inject_sample_info=True), WAN_INPUTS | dict(fps=ids(2)))
add("SkyReelsV2Transformer3DModel, diffusion forcing", WAN, WAN_INPUTS | dict(timestep=u(2, scale=1000.0)),
    shared=dict(enable_diffusion_forcing=True))
AUDIO3 = dict(io_channels=4, embed_dim=16, depth=2, num_heads=2, cond_token_dim=8, global_cond_dim=8,
    local_add_cond_dim=5, timestep_features_dim=8, ff_mult=2, num_memory_tokens=3)
AUDIO3_INPUTS = dict(hidden_states=f(4, 8), timestep=u(), encoder_hidden_states=f(5, 8), global_hidden_states=f(8))
add("StableAudio3DiTModel", AUDIO3, AUDIO3_INPUTS)
add("StableAudio3DiTModel, plain attention", AUDIO3 | dict(use_differential_attention=False),
    AUDIO3_INPUTS | dict(encoder_attention_mask=mask(5), local_add_cond=f(5, 8)))
add("TransformerTemporalModel", dict(num_attention_heads=2, attention_head_dim=4, in_channels=8, norm_num_groups=4),
    dict(hidden_states=f(3, 8, 4, 4)), call=lambda net, hidden_states: net(hidden_states.flatten(0, 1), num_frames=3,
    return_dict=False))
add("WanTransformer3DModel", WAN, WAN_INPUTS)
add("WanTransformer3DModel, image to video", WAN | dict(image_dim=8, added_kv_proj_dim=24),
    WAN_INPUTS | dict(encoder_hidden_states=f(512, 8), encoder_hidden_states_image=f(3, 8)))
add("WanTransformer3DModel, a timestep per token", WAN, WAN_INPUTS | dict(timestep=u(32, scale=1000.0)))
ANIMATE = WAN | dict(in_channels=12, latent_channels=4, image_dim=8, motion_encoder_channel_sizes={"4": 8, "8": 8,
    "16": 8}, motion_encoder_size=16, motion_style_dim=8, motion_dim=4, motion_encoder_dim=16,
    face_encoder_hidden_dim=16, face_encoder_num_heads=2, inject_face_latents_blocks=2)
add("WanAnimateTransformer3DModel", ANIMATE, dict(hidden_states=f(12, 3, 4, 4), timestep=T,
    encoder_hidden_states=f(512, 8), encoder_hidden_states_image=f(3, 8), pose_hidden_states=f(4, 2, 4, 4),
    face_pixel_values=f(3, 5, 16, 16)))
add("WanAnimateTransformer3DModel, chunks that divide by the batch", ANIMATE | dict(motion_encoder_batch_size=12),
    CASES[-1].inputs)


def animate2(net: nn.Module, hidden_states: Tensor, condition: Tensor, text: Tensor, **x: Any) -> Any:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    outputs = net(hidden_states=list(hidden_states), condition_latents=list(condition),
        encoder_hidden_states=list(text), kv_cache=WanAnimate2KVCache(1), kv_cache_mode="extract", seq_len=8,
        offset_grid_sizes=torch.tensor([[2, 2, 2]]).expand(len(text), -1), return_dict=False, **x)[0]
    return torch.stack(outputs)


add("WanAnimate2Transformer3DModel", dict(text_len=5, in_dim=8, dim=32, ffn_dim=16, freq_dim=16, text_dim=8, out_dim=4,
    num_heads=2, num_layers=1, use_img_emb=False), dict(hidden_states=f(4, 2, 4, 4), condition=f(4, 2, 4, 4),
    text=f(5, 8), timestep=T), call=animate2)
add("WanVACETransformer3DModel", WAN | dict(num_layers=2, vace_layers=[0, 1], vace_in_channels=12),
    WAN_INPUTS | dict(control_hidden_states=f(12, 2, 8, 8)))
ZIMAGE = dict(in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=8,
    axes_dims=[4, 2, 2], axes_lens=[128, 32, 32])
ZIMAGE_INPUTS = dict(hidden_states=f(4, 1, 8, 8), t=u(), cap=f(5, 8))


def zimage(net: nn.Module, hidden_states: Tensor, t: Tensor, cap: Tensor, lengths: Tensor | None = None) -> Any:
    caps = list(cap) if lengths is None else [c[:n] for c, n in zip(cap, lengths.tolist(), strict=True)]
    return torch.stack(net(x=list(hidden_states), t=t, cap_feats=caps, return_dict=False)[0])


add("ZImageTransformer2DModel", ZIMAGE, ZIMAGE_INPUTS, call=zimage)
add("ZImageTransformer2DModel, packed captions whose rows divide by the batch", ZIMAGE,
    ZIMAGE_INPUTS | dict(cap=f(96, 8), lengths=lambda n, g, d: torch.tensor([90, 20, 50, 50, 50, 50][:n])),
    call=zimage)
add("ZImageTransformer2DModel, captions of several lengths", ZIMAGE, ZIMAGE_INPUTS | dict(cap=f(40, 8),
    lengths=lambda n, g, d: torch.tensor([40 - 10 * (i % 3) for i in range(n)])), call=zimage)


def zimage_control() -> nn.Module:
    from diffusers import ZImageControlNetModel, ZImageTransformer2DModel

    own = {k: v for k, v in ZIMAGE.items() if k in ("dim", "n_refiner_layers", "n_heads", "n_kv_heads")}
    net = ZImageControlNetModel(control_layers_places=[0], control_in_dim=4, **own)
    net = ZImageControlNetModel.from_transformer(net, ZImageTransformer2DModel(**ZIMAGE))
    net.gradient_checkpointing = False  # the class does not set it
    return net


add("ZImageControlNetModel", {}, ZIMAGE_INPUTS | dict(control=f(4, 1, 8, 8)), make=zimage_control, call=lambda net,
    hidden_states, t, cap, control: net(list(hidden_states), t, list(cap), list(control)))

# fmt: on

LEFT_OUT = {
    "AnimaTextConditioner": "an encoder of text conditions, not a denoiser",
    "ConsistencyDecoderVAE": "an autoencoder whose decoder draws its noise and runs a sampling loop inside the forward",
    "ControlNetXSAdapter": "a container without a forward; its layers are those of UNetControlNetXSModel",
    "Kandinsky6SRLatentUpscalerBank": "upscales latents in one pass, not a denoiser",
    "LTX2VideoDiffusionDecoderModel": "a decoder that draws its noise and runs a sampling loop inside the forward",
    "MiniMaxMusic3ConditionEncoder": "an encoder of conditions, not a denoiser",
    "MiniMaxMusic3RVQDepthDecoder": "predicts audio codes one after the other, not a denoiser",
    "ModelMixin": "the base class",
    "MotionAdapter": "a container without a forward; its layers are those of UNetMotionModel",
}
