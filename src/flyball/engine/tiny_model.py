"""Train the small real models that ship with the package: tokenizer, target, draft and Medusa heads, from plain text.

The recipe is data (`Recipe`) and every random number comes from its seed, so that a run can be repeated. The draft is
distilled: it learns the target's whole next-token distribution on the same text, which is what speculative decoding
needs (Hinton et al. 2015, arXiv:1503.02531; Leviathan et al. 2023, arXiv:2211.17192). So are the heads, on a frozen
target.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flyball.core.clock import Clock
from flyball.core.errors import InvalidInput
from flyball.engine.speculation.heads import MedusaHeads

END, USER, ASSISTANT, SYSTEM = "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What to train and for how long; the defaults made the bundled model."""

    seed: int = 20261121
    vocab_size: int = 2048
    max_positions: int = 1024
    sequence_tokens: int = 256
    batch_tokens: int = 2048  # tokens a step, whatever the sequence length
    long_share: float = 0.1  # last share of the target's steps, trained at max_positions
    hidden: int = 256
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 512
    target_steps: int = 3600
    target_lr: float = 2e-3
    draft_hidden: int = 128
    draft_heads: int = 2
    draft_kv_heads: int = 1
    draft_intermediate: int = 384
    draft_steps: int = 1500
    draft_lr: float = 4e-3
    medusa_heads: int = 3
    medusa_inner: int = 512
    medusa_steps: int = 600
    medusa_lr: float = 1e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    chat_share: float = 0.25  # share of documents written as one turn of a chat
    validation_share: float = 0.05  # the last part of every text file


PRESETS = {
    "demo": Recipe(),
    "ci": Recipe(target_steps=30, draft_steps=20, hidden=64, layers=2, heads=2, kv_heads=1, intermediate=128,
                 draft_hidden=64, draft_heads=1, draft_intermediate=128, max_positions=256, sequence_tokens=64,
                 batch_tokens=512, medusa_inner=64, medusa_steps=10),
}  # fmt: skip

Progress = Callable[[str, int, int, float], None]  # stage, step, steps, loss (nats a token)


def read_texts(paths: Sequence[Path]) -> list[str]:
    """Read the training files; each must be non-empty UTF-8 text."""
    texts = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(f"cannot read {path} as text ({error}); give plain UTF-8 text files") from error
        if len(text) < 10_000:
            raise InvalidInput(f"{path} holds {len(text)} characters; a model needs at least 10000 to learn from")
        texts.append(text)
    if not texts:
        raise InvalidInput("no text files given; give at least one, for example: flyball train-tiny book.txt --out DIR")
    return texts


def train_tokenizer(texts: Sequence[str], vocab_size: int, max_positions: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: any text round-trips, no unknown token exists."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, USER, ASSISTANT, SYSTEM],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def documents(text: str, rng: random.Random, chat_share: float) -> list[str]:
    """Cut a text at line ends into pieces of some 400 to 2400 characters; some become one chat turn."""
    pieces, piece, limit = [], "", rng.randint(400, 2400)
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= limit:
            pieces.append(piece)
            piece, limit = "", rng.randint(400, 2400)
    if piece:
        pieces.append(piece)
    for i, piece in enumerate(pieces):
        if rng.random() < chat_share:
            lines = piece.splitlines(keepends=True)
            cut = max(1, len(lines) // 4)
            pieces[i] = USER + "".join(lines[:cut]).strip() + ASSISTANT + "".join(lines[cut:]).strip()
    return [piece + END for piece in pieces]


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], recipe: Recipe) -> tuple[Tensor, Tensor, float]:
    """Tokenise; return training ids, validation ids and bytes per token of the validation part."""
    rng = random.Random(recipe.seed)
    train, valid = [], []
    for text in texts:
        cut = int(len(text) * (1 - recipe.validation_share))
        train += documents(text[:cut], rng, recipe.chat_share)
        valid += documents(text[cut:], rng, 0.0)
    rng.shuffle(train)
    ids = [[t for doc in tokenizer(docs, verbose=False)["input_ids"] for t in doc] for docs in (train, valid)]
    bytes_per_token = sum(len(doc.encode()) for doc in valid) / len(ids[1])
    return torch.tensor(ids[0]), torch.tensor(ids[1]), bytes_per_token


def _windows(ids: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(0, len(ids) - length, (count,), generator=generator)
    return torch.stack([ids[s : s + length] for s in starts.tolist()])


def _logits(model: LlamaForCausalLM, x: Tensor) -> Tensor:
    hidden = model.model(x, use_cache=False)[0]
    return F.linear(hidden, model.lm_head.weight)


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, ids: Tensor, length: int, windows: int = 64) -> float:
    """Mean negative log-likelihood in nats a token over evenly spaced held-out windows."""
    starts = torch.linspace(0, len(ids) - length - 1, windows).long().tolist()
    losses = []
    for chunk in range(0, windows, 8):
        x = torch.stack([ids[s : s + length] for s in starts[chunk : chunk + 8]])
        logits = _logits(model, x)[:, :-1]
        losses.append(F.cross_entropy(logits.reshape(-1, logits.shape[-1]), x[:, 1:].reshape(-1)))
    return float(torch.stack(losses).mean())


def _optimise(
    model: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    ids: Tensor,
    recipe: Recipe,
    *,
    stage: str,
    steps: int,
    lr: float,
    long_share: float,
    progress: Progress,
) -> None:
    """AdamW, linear warm-up over 5 % of the steps, cosine decay to a tenth."""
    decay = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    plain = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: (
            (s + 1) / warmup if s < warmup else 0.1 + 0.45 * (1 + math.cos(math.pi * (s - warmup) / (steps - warmup)))
        ),
    )
    generator = torch.Generator().manual_seed(recipe.seed + len(stage))
    for step in range(steps):
        long = step >= steps * (1 - long_share)
        length = recipe.max_positions if long else recipe.sequence_tokens
        x = _windows(ids, max(1, recipe.batch_tokens // length), length, generator)
        loss = loss_of(x)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress(stage, step + 1, steps, float(loss.detach()))


def _llama(recipe: Recipe, *, draft: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.draft_hidden if draft else recipe.hidden,
        num_hidden_layers=1 if draft else recipe.layers,
        num_attention_heads=recipe.draft_heads if draft else recipe.heads,
        num_key_value_heads=recipe.draft_kv_heads if draft else recipe.kv_heads,
        intermediate_size=recipe.draft_intermediate if draft else recipe.intermediate,
        max_position_embeddings=recipe.max_positions,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(recipe.seed + draft)
    return LlamaForCausalLM(config)


def train_target(ids: Tensor, recipe: Recipe, progress: Progress) -> LlamaForCausalLM:
    """Next-token training of the target model from random initialisation."""
    model = _llama(recipe, draft=False)

    def loss_of(x: Tensor) -> Tensor:
        logits = _logits(model, x)[:, :-1]
        return F.cross_entropy(logits.reshape(-1, recipe.vocab_size), x[:, 1:].reshape(-1))

    _optimise(model, loss_of, ids, recipe, stage="target", steps=recipe.target_steps, lr=recipe.target_lr,
              long_share=recipe.long_share, progress=progress)  # fmt: skip
    return model.eval()


def distil_draft(target: LlamaForCausalLM, ids: Tensor, recipe: Recipe, progress: Progress) -> LlamaForCausalLM:
    """Train the one-layer draft to the target's distribution: half KL to the target, half the text itself."""
    model = _llama(recipe, draft=True)

    def loss_of(x: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = _logits(target, x)[:, :-1].reshape(-1, recipe.vocab_size).log_softmax(-1)
        got = _logits(model, x)[:, :-1].reshape(-1, recipe.vocab_size).log_softmax(-1)
        kl = F.kl_div(got, wanted, log_target=True, reduction="batchmean")
        return 0.8 * kl + 0.2 * F.nll_loss(got, x[:, 1:].reshape(-1))

    _optimise(model, loss_of, ids, recipe, stage="draft", steps=recipe.draft_steps, lr=recipe.draft_lr,
              long_share=0.0, progress=progress)  # fmt: skip
    return model.eval()


def train_medusa(target: LlamaForCausalLM, ids: Tensor, recipe: Recipe, progress: Progress) -> MedusaHeads:
    """Train heads on the frozen target: each to what the target itself says further on in the same text."""
    torch.manual_seed(recipe.seed + 2)
    heads = MedusaHeads(heads=recipe.medusa_heads, hidden=recipe.hidden, inner=recipe.medusa_inner)

    def loss_of(x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = target.model(x, use_cache=False)[0]
            wanted = F.linear(hidden, target.lm_head.weight).log_softmax(-1)
        losses = []
        for h, states in enumerate(heads(hidden)):
            got = F.linear(states[:, : -h - 2], target.lm_head.weight.detach()).log_softmax(-1)
            kl = F.kl_div(got.flatten(0, 1), wanted[:, h + 1 : -1].flatten(0, 1), log_target=True,
                          reduction="batchmean")  # fmt: skip
            losses.append(0.8**h * (0.8 * kl + 0.2 * F.nll_loss(got.flatten(0, 1), x[:, h + 2 :].flatten())))
        return torch.stack(losses).sum()

    _optimise(heads, loss_of, ids, recipe, stage="medusa", steps=recipe.medusa_steps, lr=recipe.medusa_lr,
              long_share=0.0, progress=progress)  # fmt: skip
    return heads.eval()


@torch.no_grad()
def medusa_agreement(target: LlamaForCausalLM, heads: MedusaHeads, ids: Tensor, length: int) -> list[float]:
    """How often each head's first choice is the target's own, given the text."""
    x = torch.stack([ids[s : s + length] for s in torch.linspace(0, len(ids) - length - 1, 16).long().tolist()])
    hidden = target.model(x, use_cache=False)[0]
    wanted = F.linear(hidden, target.lm_head.weight).argmax(-1)
    return [
        float((F.linear(states[:, : -h - 2], target.lm_head.weight).argmax(-1) == wanted[:, h + 1 : -1]).float().mean())
        for h, states in enumerate(heads(hidden))
    ]


@torch.no_grad()
def acceptance(target: LlamaForCausalLM, draft: LlamaForCausalLM, ids: Tensor, length: int) -> float:
    """Expected share of draft tokens that speculative sampling accepts at temperature 1: mean of sum(min(p, q))."""
    x = torch.stack([ids[s : s + length] for s in torch.linspace(0, len(ids) - length - 1, 16).long().tolist()])
    p, q = (_logits(m, x).softmax(-1) for m in (target, draft))
    return float(torch.minimum(p, q).sum(-1).mean())


def train_tiny(
    paths: Sequence[Path], out: Path, recipe: Recipe, progress: Progress, *, clock: Clock, sources: Sequence[str] = ()
) -> dict[str, float]:
    """Train all parts; write `out/target` and `out/draft` in Hugging Face format, and `out/medusa`, in bfloat16.

    Returns the held-out figures that the model card states: losses in nats a token, bits a byte, acceptance, minutes.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise InvalidInput(f"{out} is a file or a folder that is not empty; name a new folder for the trained model")
    texts = read_texts(paths)
    out.mkdir(parents=True, exist_ok=True)
    started_s = clock.now_s()
    tokenizer = train_tokenizer(texts, recipe.vocab_size, recipe.max_positions)
    recipe = replace(recipe, vocab_size=len(tokenizer))
    train_ids, valid_ids, bytes_per_token = encode(tokenizer, texts, recipe)
    if min(len(train_ids), len(valid_ids)) <= recipe.max_positions + 1:
        raise InvalidInput(
            f"the texts give {len(train_ids)} training and {len(valid_ids)} validation tokens; each part must exceed "
            f"{recipe.max_positions} tokens: give more text"
        )
    target = train_target(train_ids, recipe, progress)
    _save(target, tokenizer, out / "target")
    draft = distil_draft(target, train_ids, recipe, progress)
    _save(draft, tokenizer, out / "draft")
    heads = train_medusa(target, train_ids, recipe, progress)
    heads.save(out / "medusa")
    saved = [
        AutoModelForCausalLM.from_pretrained(out / name, dtype=torch.float32).eval() for name in ("target", "draft")
    ]
    length = recipe.sequence_tokens
    target_loss, draft_loss = (validation_loss(model, valid_ids, length) for model in saved)
    figures = {
        "target_parameters": sum(p.numel() for p in target.parameters()),
        "draft_parameters": sum(p.numel() for p in draft.parameters()),
        "train_tokens": len(train_ids),
        "valid_tokens": len(valid_ids),
        "target_loss_nats": target_loss,
        "target_loss_1024_nats": validation_loss(saved[0], valid_ids, recipe.max_positions, windows=16),
        "target_bits_per_byte": target_loss / math.log(2) / bytes_per_token,
        "draft_loss_nats": draft_loss,
        "draft_acceptance": acceptance(saved[0], saved[1], valid_ids, length),
        "medusa_parameters": sum(p.numel() for p in heads.parameters()),
        "medusa_first_agreement": medusa_agreement(target, heads, valid_ids, length)[0],
        "minutes": (clock.now_s() - started_s) / 60,
    }
    card = {"recipe": asdict(recipe), "sources": list(sources or [p.name for p in paths]), "figures": figures}
    (out / "recipe.json").write_text(json.dumps(card, indent=1) + "\n")
    return figures


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    import copy

    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
