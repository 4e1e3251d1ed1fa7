"""However people train: each training forward is recorded once, everything else not at all, and nothing is changed."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn.functional import cross_entropy, logsigmoid
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from repflow.monitor import Monitor, MonitorConfig, Snapshot
from repflow.monitor.sum_layout import SumLayout
from tests.monitor import toy
from tests.monitor.ssm_models import build
from tests.monitor.test_capture import captured, hooks

# The run-time check of annotations draws from Python's `random`, and random states are compared.
pytestmark = [
    pytest.mark.usefixtures("untyped"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True"),  # under no_grad there is none
]

IDS = toy.batch(3, 10)
BLOCKS = 3


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=BLOCKS, num_attention_heads=4, intermediate_size=48,
        attention_dropout=0.1, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


def of_transformers(reentrant: bool) -> Callable[[Any], None]:
    options = {"use_reentrant": reentrant}
    return lambda model: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def of_fsdp(kind: CheckpointImpl, what: type[nn.Module] = LlamaDecoderLayer) -> Callable[[Any], None]:
    def wrap(model: Any) -> None:
        model.config.use_cache = False
        wrapper = functools.partial(checkpoint_wrapper, checkpoint_impl=kind)
        apply_activation_checkpointing(model, wrapper, lambda module: isinstance(module, what))

    return wrap


CHECKPOINTING: dict[str, Callable[[Any], None]] = {
    "none": lambda model: None,
    "transformers, reentrant": of_transformers(True),
    "transformers": of_transformers(False),
    "FSDP, reentrant": of_fsdp(CheckpointImpl.REENTRANT),
    "FSDP": of_fsdp(CheckpointImpl.NO_REENTRANT),
    "FSDP, all blocks as one": of_fsdp(CheckpointImpl.NO_REENTRANT, transformers.LlamaModel),
}


@contextmanager
def recorded(model: Any, into: list[Tensor]) -> Iterator[None]:
    """Hooks of one's own: what runs inside adds h^(0..L) to `into`, without what backward runs again."""
    states: list[Tensor] = []

    def keep(state: Tensor) -> None:
        if torch._C._current_graph_task_id() == -1:
            states.append(state.detach().clone())

    handles = [
        model.model.layers[0].register_forward_pre_hook(lambda module, args: keep(args[0])),
        *(layer.register_forward_hook(lambda module, args, output: keep(output)) for layer in model.model.layers),
    ]
    yield
    for handle in handles:
        handle.remove()
    into.append(torch.stack(states))


def preference_step(model: Any, ids: Tensor, own: list[Tensor]) -> Tensor:
    """Rollouts, evaluation, a reference under no_grad, then two forwards with gradients and one backward, as in DPO."""
    model.generate(ids[:, :4], max_new_tokens=2, do_sample=True)
    model.eval()
    model.generate(ids[:, :4], max_new_tokens=2, do_sample=False)
    model(ids).logits.sum()  # evaluation with gradients, as for saliency
    model.train()

    def score(answers: Tensor) -> Tensor:
        return -cross_entropy(model(answers).logits.flatten(0, 1), answers.flatten())

    with torch.no_grad():
        reference = score(ids) - score(ids.flip(1))
    with recorded(model, own):
        chosen = score(ids)
    with recorded(model, own):
        rejected = score(ids.flip(1))
    loss = -logsigmoid(chosen - rejected - reference)
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("first", ["monitor", "checkpointing"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_checkpointing_rollouts_evaluation_and_references(checkpointing: str, first: str) -> None:
    """Two sampled steps and one between them, with hooks of one's own in both runs, and the monitor in one."""

    def run(watched: bool) -> list[Tensor]:
        model = llama()
        if first == "checkpointing":
            CHECKPOINTING[checkpointing](model)
        monitor = Monitor(model, MonitorConfig(every_n_steps=2)) if watched else None
        if first == "monitor":
            CHECKPOINTING[checkpointing](model)
        seen, own, losses, snapshots = captured(monitor) if monitor else [], [], [], []
        installed = hooks(model)  # transformers has one of its own
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(3):
            with monitor.step(step) if monitor else nullcontext():
                losses.append(preference_step(model, IDS, own))
            optimizer.step()
            optimizer.zero_grad()
            if monitor:
                monitor.flush()
                snapshots.append(monitor.latest)
        if monitor:
            assert all(module.training for module in model.modules()) and hooks(model) == installed
            expected = [*own[:2], *own[4:]]
            assert len(seen) == len(expected) == 4 and all(map(torch.equal, seen, expected))
            assert [snapshot.tokens for snapshot in snapshots] == [2 * IDS.numel()] * 3
        return [*losses, *(parameter.detach() for parameter in model.parameters()), torch.get_rng_state()]

    assert all(map(torch.equal, run(False), run(True)))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_blocks_that_a_loop_of_ones_own_checkpoints(compiled: bool, reentrant: bool) -> None:
    """No module around the blocks is called that would tell whether gradients are wanted."""
    torch.compiler.reset()
    model = toy.Toy()
    if compiled:
        for block in model.blocks:
            block.compile(backend="eager", fullgraph=True)
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))

    def forward(x: Any) -> Any:
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return x

    with monitor.step(0):
        with torch.no_grad():
            forward(model.embed(toy.batch()))
        forward(model.embed(toy.batch())).sum().backward()
    assert monitor._step is not None and monitor._step.ignored == {"forwards without gradients": 1}
    monitor.close()
    assert monitor.latest is not None and monitor.latest.tokens == 48


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_loop_of_ones_own_without_gradients_on_a_state_that_has_them(mode: Any) -> None:
    model = toy.Toy()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    with monitor.step(0):
        x: Any = model.embed(toy.batch())
        with mode():
            for block in model.blocks:
                x = block(x)
    assert monitor._step is not None and monitor._step.ignored == {"forwards without gradients": 1}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["Mamba", "Mamba2"])
def test_rates_are_counted_once(family: str, reentrant: bool) -> None:
    """Δ is read inside of the blocks, which run again in backward."""
    model: Any = build(family)
    of_transformers(reentrant)(model)
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    with monitor.step(0):
        for _ in range(2):
            model(input_ids=IDS, labels=IDS).loss.backward()
    monitor.close()
    assert monitor.latest is not None
    counted = SumLayout(5, (0, 1, 2, 3)).views(monitor.latest.sums)["ssm_decay_bins"].sum(-1)
    assert counted.tolist() == [2 * IDS.numel()] * 4


class Mixer(nn.Module):
    """A state-space block, as far as its decay is concerned, with matrix products before and after Δ."""

    def __init__(self) -> None:
        super().__init__()
        self.x_proj, self.dt_proj = nn.Linear(16, 16 + 2 * 3, bias=False), nn.Linear(16, 16)
        self.A_log, self.out_proj = nn.Parameter(torch.randn(16, 3)), nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        delta = nn.functional.softplus(self.dt_proj(self.x_proj(x.flatten(0, 1))[:, :16]))
        decay = torch.exp(-delta * self.A_log.exp().amin(1))
        return x + torch.tanh(self.out_proj(decay)).view_as(x)


class Mixers(nn.Module):
    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks, self.run = nn.ModuleList([Mixer() for _ in range(BLOCKS)]), run

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.run(block, x)
        return x


def save_everything(*args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE


@pytest.mark.parametrize("policy", ["products", "everything"])
def test_selective_checkpointing_gets_its_own_results_back(policy: str) -> None:
    """It keeps what chosen operations return, in their order: those of the monitor must not be among them."""
    products = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    keep = products if policy == "products" else save_everything
    contexts = functools.partial(create_selective_checkpoint_contexts, keep)

    def run(watched: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = Mixers(lambda block, x: checkpoint(block, x, use_reentrant=False, context_fn=contexts))  # type: ignore
        monitor, x = Monitor(model, MonitorConfig(every_n_steps=1)), torch.randn(4, 12, 16)
        with monitor.step(0) if watched else nullcontext():
            model(x).square().mean().backward()
        monitor.close()
        assert (monitor.latest is not None and monitor.latest.tokens == 48) == watched
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    bare, watched = run(False), run(True)
    assert len(bare) == 5 * BLOCKS and all(map(torch.equal, bare, watched))


def test_operations_of_the_monitor_are_not_counted_as_the_models() -> None:
    model, counts = toy.Toy(), []
    for watched in (False, True):
        monitor = Monitor(model, MonitorConfig(every_n_steps=1))
        with FlopCounterMode(display=False) as counter, monitor.step(0) if watched else nullcontext():
            toy.loss_of(model, toy.batch()).backward()
        counts.append(counter.get_total_flops())
        monitor.close()
    assert counts[0] == counts[1] > 0


def test_a_block_that_takes_gradients_while_it_runs() -> None:
    """As in test-time training. Its mixer, checkpointed, runs again in that backward, in the midst of the forward."""

    class Inner(Mixer):
        def forward(self, x: Tensor) -> Tensor:
            inner = x.detach().requires_grad_()
            value = checkpoint(super().forward, inner, use_reentrant=False)
            assert isinstance(value, Tensor)
            (slope,) = torch.autograd.grad(value.square().sum(), inner)
            return x + 0.1 * slope + self.out_proj(x)

    model = Mixers(lambda block, x: block(x))
    model.blocks = nn.ModuleList([Inner() for _ in range(BLOCKS)])
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    with monitor.step(0):
        model(torch.randn(4, 12, 16)).sum().backward()
    monitor.close()
    assert monitor.latest is not None and monitor.latest.tokens == 48
    counted = SumLayout(4, (0, 1, 2)).views(monitor.latest.sums)["ssm_decay_bins"].sum(-1)
    assert counted.tolist() == [48] * 3


@pytest.mark.parametrize("way", ["bf16 autocast", "fp16 autocast", "bf16 weights"])
@pytest.mark.parametrize("family", ["Llama", "Mamba"])
def test_mixed_precision_and_a_step_that_the_scaler_skips(family: str, way: str) -> None:
    """In fp16 the first scale overflows: the gradients of step 0 are infinite, and the optimizer leaves it out."""
    dtype = torch.float16 if way == "fp16 autocast" else torch.bfloat16

    def run(watched: bool) -> tuple[list[Tensor], list[float], list[Snapshot], list[Tensor]]:
        model: Any = build(family)
        model = model.to(dtype) if way == "bf16 weights" else model
        monitor = Monitor(model, MonitorConfig(every_n_steps=1)) if watched else None
        seen, snapshots = captured(monitor) if monitor else [], []
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, enabled=way == "fp16 autocast", growth_interval=2)
        optimizer, scales, kept = torch.optim.SGD(model.parameters(), 0.1), [], []
        for step in range(4):
            with monitor.step(step) if monitor else nullcontext():
                for ids in (IDS, IDS.flip(0)):
                    with torch.autocast("cpu", dtype, enabled=way != "bf16 weights"):
                        loss = model(input_ids=ids, labels=ids).loss / 2
                    scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if step == 1 and scaler.is_enabled():
                scaler.update(64.0)
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
            kept.append([parameter.detach().clone() for parameter in model.parameters()])
            if monitor:
                monitor.flush()
                snapshots.append(monitor.latest)
        if way == "fp16 autocast":
            assert scales == [2.0**39, 64.0, 64.0, 128.0] and all(map(torch.equal, kept[0], kept[1]))
        assert not all(map(torch.equal, kept[1], kept[3]))
        if monitor:
            # Nothing is narrowed: autocast leaves the stream in fp32, and Mamba's is, whatever its weights are.
            wide = dtype if way == "bf16 weights" and family == "Llama" else torch.float32
            assert [states.dtype for states in seen] == [wide] * 8
            assert [(s.step, s.tokens) for s in snapshots] == [(step, 2 * IDS.numel()) for step in range(4)]
            assert all(s.v_loc.isfinite() and s.nonfinite.sum() == 0 for s in snapshots)
        return kept[-1], scales, snapshots, [torch.get_rng_state()]

    bare, watched = run(False), run(True)
    assert all(map(torch.equal, bare[0] + bare[3], watched[0] + watched[3])) and bare[1] == watched[1]


@pytest.mark.parametrize("way", ["grad", "vmap"])
def test_forwards_inside_of_torch_func_are_left_out(way: str) -> None:
    """As those of gradients per example are: their states are no tensors by themselves. Others are measured."""
    model = toy.Toy()
    model.eval()  # without dropout, of which `vmap` does not know
    for module in model.modules():
        module.training = not isinstance(module, nn.Dropout)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def loss(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
        return cross_entropy(torch.func.functional_call(model, weights, ids[None])[0], ids)

    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    slopes = torch.func.grad(loss)
    with pytest.warns(RuntimeWarning, match=r"recorded nothing on step 0: .* saw \d forwards inside of torch\.func"):
        for step in range(2):
            with monitor.step(step):
                if way == "vmap":
                    torch.func.vmap(slopes, (None, 0))(weights, IDS)
                else:
                    slopes(weights, IDS[0])
                if step:
                    toy.loss_of(model, IDS).backward()
        monitor.close()
    assert monitor.latest is not None and (monitor.latest.step, monitor.latest.tokens) == (1, 30)


def test_blocks_skipped_at_random() -> None:
    """LayerDrop: forwards without a block, also the first one, are left out, and that is said; a probe's has all."""

    class Dropping(toy.Toy):
        skipped = 0

        def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            x = self.embed(ids)
            for index, block in enumerate(self.blocks):
                x = block(x) if not self.training or index != self.skipped else x
            return self.head(self.norm(x))

    def latest(probe: Tensor | None) -> Snapshot | None:
        monitor = Monitor(model, MonitorConfig(), probe_batch=probe)
        with monitor.step(0):
            toy.loss_of(model, IDS).backward()
        monitor.close()
        return monitor.latest

    model = Dropping()
    for skipped, seen in enumerate((r"'blocks\.1' where 'blocks\.0'", r"'blocks\.2' where 'blocks\.1'")):
        model.skipped = skipped
        with pytest.warns(RuntimeWarning, match=f"saw 1 forwards that ran {seen} was expected.*measure a probe_batch"):
            assert latest(None) is None
        snapshot = latest(IDS)
        assert snapshot is not None and snapshot.tokens == 30
