"""A contender of the end-to-end benchmark at work, in this process or in one of its own."""

import time
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from traceback import format_exception
from typing import Any

import torch
from torch import Tensor, nn

from nf4.bench.model import contenders
from nf4.bench.model.llama import Options, make_model, plain_products, tokens
from nf4.tools.training import trainable

LEARNING_RATE = 1e-4
PROMPT = 32  # tokens
CHECKED = 256  # tokens whose losses are compared


@dataclass(frozen=True)
class Check:
    """What a contender computed before anything was timed.

    Attributes:
        loss: of the first training step, nats per token.
        token_losses: of the first tokens, nats.
        spread: root mean square of the logits about their mean, token by token.
        plain: for ours, the token losses with each product computed by PyTorch from the
            dequantized weight; None for others.
        trained: elements of the adapters.
    """

    loss: float
    token_losses: list[float]
    spread: float
    plain: list[float] | None
    trained: int


class ContenderError(RuntimeError):
    """What a contender's process raised, or that it ended."""


class Run:
    """A contender in this process: its model, ready to train.

    Args:
        name: of `contenders.LABELS`.
        options: what is timed.
    """

    def __init__(self, name: str, options: Options) -> None:
        self.options, self.name = options, name
        self.device = torch.device(options.device)
        self.dtype = contenders.DTYPES[options.dtype]
        # Imports, compilers and libraries take memory at first use: not the model's
        small = replace(options, size="tiny")
        contenders.backward(make_model(name, small), tokens(small), self.dtype)
        self.before = _held(self.device)
        self.model = make_model(name, options)
        self.optimizer: Any = contenders.optimizer_of(self.model, LEARNING_RATE)
        self.batch = tokens(options)

    def ask(self, method: str, *args: Any) -> Any:
        """Call one of the methods below, as `Child.ask` does."""
        return getattr(self, method)(*args)

    def check(self) -> Check:
        """Run a first step but for the optimizer; raise unless every adapter gets a gradient."""
        plain = None
        if self.name == "nf4":
            computing = contenders.computing_in(self.dtype, self.device)
            with plain_products(self.model), computing, torch.no_grad():
                logits = self.model(self.batch[:1], use_cache=False).logits
            plain = self._token_losses(logits)[0]
        out = contenders.backward(self.model, self.batch, self.dtype)
        losses, spread = self._token_losses(out.logits.detach())
        contenders.check_gradients(self.model)
        trained = sum(p.numel() for p in trainable(self.model))
        found = Check(out.loss.item(), losses, spread, plain, trained)
        del out
        self.optimizer.zero_grad()
        _forget_peak(self.device)
        return found

    def _token_losses(self, logits: Tensor) -> tuple[list[float], float]:
        """Return the losses of the first tokens, and the spread of their logits."""
        targets = self.batch[0, 1 : CHECKED + 1]
        logits = logits[0, : len(targets)].float()
        losses = nn.functional.cross_entropy(logits, targets, reduction="none")
        spread = logits.std(dim=-1, correction=0).square().mean().sqrt()
        return losses.tolist(), spread.item()

    def step(self) -> float:
        """Train one step and return the seconds it took."""
        self._wait()
        begin = time.perf_counter()
        contenders.train_step(self.model, self.batch, self.optimizer, self.dtype)
        self._wait()
        return time.perf_counter() - begin

    def peak(self) -> int | None:
        """Return the most bytes held since `check`."""
        most = _held(self.device, most=True)
        return None if most is None or self.before is None else most - self.before

    def prepare_decoding(self) -> None:
        """Leave training: drop the optimizer, and round the adapters to the dtype of products."""
        self.optimizer = None
        for p in trainable(self.model):
            p.grad, p.data = None, p.data.to(self.dtype)
        self.model.eval()

    def decode(self, batch: int) -> float:
        """Decode and return the seconds from the first new token to the last."""
        begin: list[float] = []

        def clock(ids: Tensor, _: Any, **__: Any) -> Tensor:
            if not begin:
                self._wait()
                begin.append(time.perf_counter())
            return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

        prompt = tokens(replace(self.options, batch=batch, length=PROMPT))
        contenders.generate(self.model, prompt, self.options.new_tokens, [clock])
        self._wait()
        return time.perf_counter() - begin[0]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Do nothing; `Child` ends its process."""


class Child:
    """A `Run` in a process of its own, which alone makes its memory known.

    The process makes its model while others are started; `ask` waits for that.

    Args:
        name: of `contenders.LABELS`.
        options: what is timed.
    """

    def __init__(self, name: str, options: Options) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, name, options), daemon=True)
        self.process.start()
        theirs.close()
        self.ready = False

    def ask(self, method: str, *args: Any) -> Any:
        """Call a method of the `Run` and return its result.

        Raises:
            ContenderError: it raised, or the process ended.
        """
        try:
            if not self.ready:
                self._answer()
                self.ready = True
            self.connection.send((method, args))
            return self._answer()
        except (EOFError, ConnectionError):
            self.process.join()
            code = self.process.exitcode
            raise ContenderError(f"the process ended with exit status {code}") from None

    def _answer(self) -> Any:
        good, answer = self.connection.recv()
        if not good:
            reason, trace = answer
            error = ContenderError(reason)
            error.add_note(trace)
            raise error
        return answer

    def close(self) -> None:
        """End the process."""
        self.connection.close()
        self.process.join()


def _serve(connection: Connection, name: str, options: Options) -> None:
    """Make a `Run` and answer what `Child` asks, until it hangs up."""
    run: Run | None = None
    with suppress(EOFError, ConnectionError):
        while True:
            try:
                if run is None:
                    run, answer = Run(name, options), None
                else:
                    method, args = connection.recv()
                    answer = run.ask(method, *args)
            except (EOFError, ConnectionError):
                return
            except Exception as error:  # whatever a contender's packages raise is its answer
                reason = f"{type(error).__name__}: {error}"
                connection.send((False, (reason, "".join(format_exception(error)))))
                if run is None:
                    return
            else:
                connection.send((True, answer))


def _held(device: torch.device, most: bool = False) -> int | None:
    """Return the bytes held by tensors on a GPU, or by the process as Linux tells; or the most."""
    if device.type == "cuda":
        read = torch.cuda.max_memory_allocated if most else torch.cuda.memory_allocated
        return read(device)
    field = "VmHWM:" if most else "VmRSS:"
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(field):
                return 1024 * int(line.split()[1])
    return None


def _forget_peak(device: torch.device) -> None:
    """Count the most memory held anew from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # Linux' command for VmHWM; without it building counts too
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
