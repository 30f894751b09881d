"""Train a small OLMoE-style mixture of experts on text of several domains, then record where its router sends held-out
text.

    python examples/train_moe.py --out runs/small                                   # text that every machine has
    python examples/train_moe.py --out runs/mine --text wiki.txt code.txt stdlib    # own files, one domain each
    python examples/train_moe.py --out runs/mine --text wiki.txt code.txt stdlib --load runs/mine/checkpoint-2000

An ordinary training script: moeplace takes the three lines marked `moeplace` in `record_held_out`. They stand after
training because early routing misleads: it still moves while the experts specialise. The `churn` in the progress lines
says how much: the share of a fixed probe batch's tokens, averaged over layers, whose expert set changed since the last
one.

About 40 minutes on two idle CPU cores. On a busy machine set OMP_NUM_THREADS=1: two threads that wait for each other
and for other processes were seen to fall from 3,000 to 500 tokens/s, where one thread kept 800 to 1,600.
"""

import argparse
import ast
import hashlib
import json
import math
import random
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup
from transformers.utils import logging

BUILT_IN = ("pydoc", "stdlib", "docstrings")
HELD_OUT = 0.1  # the last tenth of each domain is never trained on
LARGEST_BUILT_IN = 4_000_000  # characters; more would only slow the tokenizer down
SEQUENCE = 256  # tokens
VOCABULARY = 4096


@dataclass(frozen=True)
class Domain:
    """One kind of text as token ids: `train` [tokens] and `held_out` [sequences, SEQUENCE]."""

    name: str
    train: torch.Tensor
    held_out: torch.Tensor


# ---------------------------------------------------------------- text


def read_text(source: str) -> tuple[str, str]:
    """Name and text of one domain: a word of BUILT_IN, or a file whose stem is the name."""
    if source in BUILT_IN:
        return source, "\n\n".join(built_in_documents(source))[:LARGEST_BUILT_IN]
    path = Path(source)
    if not path.is_file():
        sys.exit(f"--text {source}: no such file; give text files or words of {', '.join(BUILT_IN)}")
    return path.stem, path.read_text(encoding="utf-8", errors="replace")


def built_in_documents(word: str) -> list[str]:
    """Documents of a domain that comes with Python, shuffled so that the held-out tail is like the rest."""
    if word == "pydoc":
        from pydoc_data.topics import topics

        documents = [topics[key] for key in sorted(topics)]
    else:
        root = Path(sysconfig.get_paths()["stdlib"])
        left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "pydoc_data", "encodings"}
        paths = (path for path in sorted(root.rglob("*.py")) if not left_out & set(path.relative_to(root).parts))
        documents = [part for path in paths if (part := source_part(path, docstrings=word == "docstrings"))]
    random.Random(0).shuffle(documents)
    return documents


def source_part(path: Path, docstrings: bool) -> str:
    """The docstrings of a module, or its source without them: two domains that share no text."""
    source = path.read_text(encoding="utf-8", errors="replace")
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # templates and deliberately broken modules are not worth stopping for
        return ""
    texts: list[str] = []
    lines = source.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                texts.append(text)
                first, last = node.body[0].lineno, node.body[0].end_lineno or node.body[0].lineno
                lines[first - 1 : last] = [""] * (last - first + 1)
    return "\n\n".join(texts) if docstrings else "\n".join(line for line in lines if line.strip())


def train_tokenizer(texts: dict[str, str], cache: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, kept in `cache` under its size and the fingerprint of the text it was trained on."""
    fingerprint = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:16]
    path = cache / f"tokenizer-{vocabulary}-{fingerprint}.json"
    if not path.is_file():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<|endoftext|>"], show_progress=False)
        trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator(texts.values(), trainer)
        unfinished = path.with_suffix(".tmp")
        tokenizer.save(str(unfinished))
        unfinished.replace(path)
    return PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="<|endoftext|>")  # type: ignore[no-untyped-call]


def load_domains(
    args: argparse.Namespace, vocabulary: int = VOCABULARY
) -> tuple[list[Domain], PreTrainedTokenizerFast]:
    """Every domain as token ids, with the tokenizer of the checkpoint or one trained on the training part."""
    texts = dict(read_text(source) for source in args.text)
    if len(texts) < len(args.text):
        sys.exit(f"--text: {len(args.text)} sources but the names {', '.join(texts)}; give files of different stems")
    cuts = {name: int(len(text) * (1 - HELD_OUT)) for name, text in texts.items()}
    if args.load is not None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.load)
    else:
        tokenizer = train_tokenizer({name: text[: cuts[name]] for name, text in texts.items()}, args.out, vocabulary)

    def ids(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)

    domains = []
    for name, text in texts.items():
        train, tail = ids(text[: cuts[name]]), ids(text[cuts[name] :])
        sequences = len(tail) // SEQUENCE
        if not sequences or len(train) <= SEQUENCE:
            need = int(SEQUENCE / HELD_OUT)
            sys.exit(
                f"--text {name}: {len(train) + len(tail)} tokens; about {need} are needed, so that a tail is held out"
            )
        domains.append(Domain(name, train, tail[: sequences * SEQUENCE].view(sequences, SEQUENCE)))
    return domains, tokenizer


def batches(domains: list[Domain], sequences: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches [sequences, SEQUENCE] of random windows; the domains take turns, so all are drawn evenly."""
    generator = torch.Generator().manual_seed(seed)
    drawn = 0
    while True:
        windows = []
        for domain in (domains[(drawn + i) % len(domains)] for i in range(sequences)):
            start = int(torch.randint(len(domain.train) - SEQUENCE, (), generator=generator))
            windows.append(domain.train[start : start + SEQUENCE])
        drawn += sequences
        yield torch.stack(windows)


# ---------------------------------------------------------------- model and training


def build_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> OlmoeForCausalLM:
    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=max(16, args.hidden * 2 // 3 // 16 * 16),  # grouped matrix products want multiples of 16
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        max_position_embeddings=SEQUENCE,
        router_aux_loss_coef=0.01,
        use_cache=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return OlmoeForCausalLM(config)


@torch.no_grad()
def expert_sets(model: OlmoeForCausalLM, probe: torch.Tensor) -> torch.Tensor:
    """The experts that each token of `probe` goes to, sorted: [layers, tokens, top_k]."""
    logits = model(input_ids=probe, output_router_logits=True, logits_to_keep=1).router_logits
    return torch.stack(list(logits)).topk(model.config.num_experts_per_tok, dim=-1).indices.sort(dim=-1).values


def train(
    model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, domains: list[Domain], args: argparse.Namespace
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(100, args.steps // 10), args.steps)
    probe = torch.cat([domain.held_out[:2] for domain in domains]).to(model.device)
    before = expert_sets(model, probe)
    recent: list[float] = []
    clock = time.perf_counter()
    for step, batch in enumerate(batches(domains, args.batch, args.seed), start=1):
        tokens = batch.to(model.device)
        output = model(input_ids=tokens, labels=tokens, output_router_logits=True)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        balance = output.aux_loss.item()
        recent.append(output.loss.item() - model.config.router_aux_loss_coef * balance)
        if step % 50 == 0 or step == args.steps:
            rate = len(recent) * tokens.numel() / (time.perf_counter() - clock)
            now = expert_sets(model, probe)
            churn = float((now != before).any(dim=-1).float().mean())
            loss = sum(recent) / len(recent)
            line = f"step {step}/{args.steps}  loss {loss:.3f}  balance {balance:.2f}"
            print(f"{line}  churn {churn:.1%}  {rate:,.0f} tokens/s", file=sys.stderr, flush=True)
            if not math.isfinite(loss):
                sys.exit(f"the loss is {loss} at step {step}: try --lr below {args.lr}")
            before, recent, clock = now, [], time.perf_counter()
        if step % 500 == 0 or step == args.steps:
            save_checkpoint(model, tokenizer, args.out / f"checkpoint-{step}")
        if step == args.steps:
            return


def save_checkpoint(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Write beside and rename: a folder called checkpoint-N is always a whole one."""
    unfinished = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(path, ignore_errors=True)
    unfinished.rename(path)


# ---------------------------------------------------------------- held-out text


@torch.no_grad()
def held_out_loss(model: OlmoeForCausalLM, domain: Domain, args: argparse.Namespace) -> float:
    """Mean cross-entropy in nats a token over some `args.record_tokens` tokens spread over the held-out text."""
    wanted: int = min(len(domain.held_out), max(1, args.record_tokens // SEQUENCE))
    spread = torch.linspace(0, len(domain.held_out) - 1, wanted).long()
    total = 0.0
    for batch in torch.split(domain.held_out[spread].to(model.device), args.batch):
        total += float(model(input_ids=batch, labels=batch).loss.item()) * len(batch)
    return total / wanted


def record_held_out(model: OlmoeForCausalLM, domains: list[Domain], args: argparse.Namespace) -> dict[str, float]:
    """Held-out loss of each domain, its routing recorded on the way."""
    import moeplace as mp  # moeplace

    losses = {}
    with mp.profile(model, out=args.trace) as recorder:  # moeplace
        for domain in domains:
            recorder.workload = domain.name  # moeplace
            losses[domain.name] = held_out_loss(model, domain, args)
    return losses


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer, checkpoints and the trace")
    parser.add_argument(
        "--text", nargs="+", default=list(BUILT_IN), metavar="FILE", help=f"a domain each: a file, or {BUILT_IN}"
    )
    parser.add_argument("--steps", type=int, default=2000, help="of training")
    parser.add_argument("--batch", type=int, default=16, help=f"sequences a step, of {SEQUENCE} tokens each")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=32, help="a layer")
    parser.add_argument("--top-k", type=int, default=2, help="experts a token")
    parser.add_argument("--hidden", type=int, default=192, help="hidden size, a multiple of 32")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="largest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--load", type=Path, metavar="CHECKPOINT", help="record this checkpoint instead of training")
    parser.add_argument("--trace", type=Path, help="where the recorded routing goes (default: OUT/trace)")
    parser.add_argument("--record-tokens", type=int, default=32_768, help="held-out tokens to record, a domain")
    args = parser.parse_args()
    for name in ("steps", "batch", "layers", "experts", "top_k", "record_tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected 1 or more")
    if args.hidden < 32 or args.hidden % 32:
        parser.error(f"--hidden {args.hidden}: expected a multiple of 32, the size of an attention head")
    if args.top_k > args.experts:
        parser.error(f"--top-k {args.top_k}: expected at most --experts {args.experts}")
    if args.load is not None and not (args.load / "config.json").is_file():
        parser.error(f"--load {args.load}: no config.json there; give a folder checkpoint-N that this script wrote")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.trace = args.trace or args.out / "trace"
    if args.trace.exists():
        parser.error(f"--trace {args.trace}: exists already; remove it or give another folder")
    return args


def main() -> None:
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    domains, tokenizer = load_domains(args)
    for domain in domains:
        sizes = f"{len(domain.train):,} training tokens, {domain.held_out.numel():,} held out"
        print(f"{domain.name}: {sizes}", file=sys.stderr)
    model = OlmoeForCausalLM.from_pretrained(args.load) if args.load else build_model(args, tokenizer)
    model.set_experts_implementation("grouped_mm")  # fastest here: 3,570 tokens/s on two CPU cores, eager 3,060
    model.to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {model.device}", file=sys.stderr, flush=True)
    if args.load is None:
        train(model, tokenizer, domains, args)
    model.train(False)
    for name, loss in record_held_out(model, domains, args).items():
        print(f"held-out loss  {name}  {loss:.3f}")
    print(f"routing recorded in {args.trace}", file=sys.stderr)


if __name__ == "__main__":
    main()
