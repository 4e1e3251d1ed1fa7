"""`mamba_ssm.MambaLMHeadModel`, tiny: its own Python code, on a GPU as it was built, on a CPU with reference scans.

`python -m tests.mamba_models` looks at each on the CPU, in a process of its own, since transformers would call
the scans of any mamba_ssm that it can import. It needs mamba_ssm's source and einops on the path, but no GPU.
"""

import sys
from itertools import product
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from repflow.monitor import Monitor, MonitorConfig
from tests.matrix import captured

LAYERS, WIDTH, VOCABULARY = 3, 64, 64
MODELS: dict[str, dict[str, Any]] = {
    "Mamba": dict(ssm_cfg={}),
    "Mamba and attention": dict(ssm_cfg={}, attn_layer_idx=[1], attn_cfg={"num_heads": 4}),
    "Mamba2": dict(ssm_cfg={"layer": "Mamba2", "headdim": 16}),
    "Mamba2 and attention": dict(
        ssm_cfg={"layer": "Mamba2", "headdim": 16}, attn_layer_idx=[1], attn_cfg={"num_heads": 4}
    ),
    "Mamba and MLP": dict(ssm_cfg={}, d_intermediate=128),
}


def make(name: str, *, device: str, ssm: dict[str, Any] | None = None, **options: Any) -> nn.Module:
    """One of `MODELS`; `ssm` and `options` are added to its configuration."""
    from mamba_ssm.models.config_mamba import MambaConfig  # pyright: ignore[reportMissingImports]
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    chosen = {**MODELS[name], "ssm_cfg": {**MODELS[name]["ssm_cfg"], **(ssm or {})}}
    dtype = options.pop("dtype", torch.float32)
    config = MambaConfig(d_model=WIDTH, n_layer=LAYERS, vocab_size=VOCABULARY, **chosen, **options)
    return MambaLMHeadModel(config, device=device, dtype=dtype).train()


def expected_parts(name: str) -> list[str]:
    """Of each block."""
    parts = ["ssm"] * LAYERS
    if "attention" in name:
        parts[1] = "attention"
    return [f"{part}+mlp" for part in parts] if "MLP" in name else parts


def train(model: nn.Module, monitor: Monitor | None = None, steps: int = 2, tokens: int = 16) -> list[float]:
    """Losses of a few steps on random tokens."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    device = next(model.parameters()).device
    losses = []
    for step in range(steps):
        ids = torch.randint(VOCABULARY, (2, tokens), generator=torch.Generator().manual_seed(step)).to(device)
        if monitor is None:
            loss = loss_of(model, ids)
            loss.backward()
        else:
            with monitor.step(step):
                loss = loss_of(model, ids)
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(ids).logits.float()
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def own_states(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """h^(0..L) by hooks of one's own: what the first block takes, and hidden + residual of what each returns."""
    blocks = list(model.get_submodule("backbone.layers").children())
    seen: list[Tensor] = []
    handles = [
        blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone())),
        *(
            block.register_forward_hook(lambda module, args, out: seen.append((out[0] + out[1]).detach()))
            for block in blocks
        ),
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    return seen


def watch(model: nn.Module) -> tuple[Monitor, list[Tensor]]:
    """A monitor of every step, and the list that its states go to."""
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    return monitor, captured(monitor)


def norm_inputs(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """h^(0..L) as the first norm of each unfused block and the last norm take them, in the dtype of the weights."""
    seen: list[Tensor] = []
    norms = [block.get_submodule("norm") for block in model.get_submodule("backbone.layers").children()]
    norms.append(model.get_submodule("backbone.norm_f"))
    handles = [
        norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone())) for norm in norms
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    return seen


def logits_from(model: Any, state: Tensor) -> Tensor:
    """What the head makes of h^(L)."""
    norm = model.backbone.norm_f
    return model.lm_head(norm(state.to(norm.weight.dtype)))


def use_references() -> None:
    """Import mamba_ssm without its compiled part, and let it call its own references in place of its kernels."""
    sys.modules["selective_scan_cuda"] = ModuleType("selective_scan_cuda")
    from mamba_ssm.models import mixer_seq_simple  # pyright: ignore[reportMissingImports]
    from mamba_ssm.modules import block, mamba2, mamba_simple  # pyright: ignore[reportMissingImports]
    from mamba_ssm.ops import selective_scan_interface  # pyright: ignore[reportMissingImports]
    from mamba_ssm.ops.triton import layer_norm, layernorm_gated, ssd_combined  # pyright: ignore[reportMissingImports]

    def add_norm(x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Any:
        residual, wide = options.get("residual"), options.pop("residual_in_fp32")
        reference = layer_norm.rms_norm_ref if options.pop("is_rms_norm") else layer_norm.layer_norm_ref
        result = reference(x, weight, bias, upcast=True, **options)
        if not options["prenorm"]:
            return result
        dtype = residual.dtype if residual is not None else torch.float32 if wide else x.dtype  # as the kernel has it
        return result[0], result[1].to(dtype)

    def norm(self: Any, x: Tensor) -> Tensor:
        return layer_norm.rms_norm_ref(x, self.weight, self.bias, eps=self.eps, upcast=True)

    def gated_norm(self: Any, x: Tensor, z: Tensor | None = None) -> Tensor:
        options = {name: getattr(self, name) for name in ("eps", "group_size", "norm_before_gate")}
        return layernorm_gated.rms_norm_ref(x, self.weight, self.bias, z=z, **options)

    def scan(x: Tensor, dt: Tensor, *args: Tensor, **options: Any) -> Tensor:
        known = {name: options[name] for name in ("D", "z", "dt_bias", "dt_softplus")}
        return ssd_combined.ssd_selective_scan(x, dt, *args, **known)

    selective_scan = selective_scan_interface.selective_scan_ref
    mamba_simple.selective_scan_fn = selective_scan_interface.selective_scan_fn = selective_scan
    mamba2.mamba_chunk_scan_combined = scan
    block.layer_norm_fn = mixer_seq_simple.layer_norm_fn = add_norm
    layer_norm.RMSNorm.forward = norm
    layernorm_gated.RMSNorm.forward = gated_norm


def main() -> None:
    """Every model: kinds, states and losses."""
    use_references()
    for name in MODELS:
        for dtype, wide, fused in product((torch.float32, torch.bfloat16), (True, False), (True, False)):
            check_on_cpu(name, dtype=dtype, residual_in_fp32=wide, fused_add_norm=fused, rms_norm=fused)
            print(f"{name}, {dtype}, {'fused' if fused else 'unfused'}, residual_in_fp32={wide}: as expected")


def check_on_cpu(name: str, **options: Any) -> None:
    """States as hooks of one's own and the norms see them, kinds, and losses as without the monitor."""
    fast = {"use_mem_eff_path": False} if "Mamba2" in name else {"use_fast_path": False}
    bare = train(make(name, device="cpu", ssm=fast, **options))
    model: Any = make(name, device="cpu", ssm=fast, **options)
    ids = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
    expected, normed = own_states(model, ids), norm_inputs(model, ids)
    logits = model(ids).logits
    atol = 1e-5 if options["dtype"] == torch.float32 else 1e-2  # a fused norm does not round the state first
    torch.testing.assert_close(logits_from(model, expected[-1]), logits, atol=atol, rtol=0)
    monitor, seen = watch(model)
    assert ["+".join(block.parts) for block in monitor.stream.blocks] == expected_parts(name), monitor.stream
    assert train(model, monitor) == bare
    monitor.flush()
    assert monitor.enabled and monitor.latest is not None and monitor.latest.tokens == 2 * 16
    ours, dtype = seen[0], options["dtype"]
    assert ours.dtype == (torch.float32 if options["residual_in_fp32"] else dtype)
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(ours, expected, strict=True))
    # A fused norm is no call of a module.
    assert len(normed) == (0 if options["fused_add_norm"] else LAYERS + 1)
    assert all(torch.equal(a.to(dtype), b) for a, b in zip(ours, normed, strict=bool(normed)))


if __name__ == "__main__":
    main()
