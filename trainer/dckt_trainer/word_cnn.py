"""The Word CNN of Kim (2014): a text becomes one vector.

Shape letters: B texts, L tokens, E width of word vectors, N maps of each window, C classes. Windows may reach over both
ends of a text, as in Kim's code, but a window with padding alone never counts; so a vector does not depend on padding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from dckt.errors import TrainingError
from dckt.preprocessing import token_batch
from dckt_trainer.config import TextConfig
from dckt_trainer.seeds import seed_of, torch_generator
from dckt_trainer.word_bag import WordBag

POOL = 20  # batches
MAX_NORM = 3.0  # Kim's cap on the norm of each class's weights


class WordCNN(nn.Module):
    """Token ids (B, L) int64 to text vectors (B, windows * N) float32.

    Args:
        vectors: (V, E) word vectors; they stay as they are, and row 0 is padding.
        windows: widths of the windows, in words.
        maps: N feature maps a window.
    """

    def __init__(self, vectors: Tensor, windows: Sequence[int], maps: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vectors.shape[0], vectors.shape[1], padding_idx=0, _weight=vectors, _freeze=True)
        self.windows = tuple(windows)
        self.convolutions = nn.ModuleList(
            [nn.Conv1d(vectors.shape[1], maps, window, padding=window - 1) for window in windows]
        )
        self.outputs = len(windows) * maps

    def forward(self, tokens: Tensor) -> Tensor:
        """Convolution, ReLU, maximum over time."""
        known = (tokens != 0).unsqueeze(1).float()  # (B, 1, L)
        rows = self.embedding(tokens).transpose(1, 2)  # (B, E, L)
        vectors = []
        for window, convolution in zip(self.windows, self.convolutions, strict=True):
            # 1 where the window touches a word. After ReLU nothing is below 0, so a masked place never wins.
            # In two dimensions, because max_pool1d would fix L to the example's when the graph is exported.
            touches = functional.max_pool2d(functional.pad(known, (window - 1, window - 1)), (1, window), 1)
            vectors.append((functional.relu(convolution(rows)) * touches).amax(2))
        return torch.cat(vectors, 1)


def train_word_cnn(
    cnn: WordCNN,
    train: tuple[Sequence[Sequence[int]], Sequence[int]],
    validation: tuple[Sequence[Sequence[int]], Sequence[int]],
    config: TextConfig,
    *,
    seed: int,
    stream: str,
    device: torch.device,
    advance: Callable[[dict[str, float]], None] = lambda figures: None,
) -> WordCNN:
    """Trains the CNN as a classifier of labelled texts; its last layer is then left out.

    Adadelta, dropout and the cap on the last layer's norm are Kim's. The pass with the best validation accuracy counts;
    with no validation texts, the last.

    Args:
        cnn: what to start from; it is not changed.
        train: token ids and class numbers.
        validation: likewise; may be empty.
        config: passes, batch, dropout.
        seed: the run's seed.
        stream: name of this stage's random numbers.
        device: where to train.
        advance: called after each pass with its figures.

    Raises:
        TrainingError: the loss is not finite.
    """
    texts, labels = train
    classes = max([*labels, *validation[1]]) + 1
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(seed, stream, "weights"))
        model = copy.deepcopy(cnn).to(device)
        last = nn.Linear(model.outputs, classes).to(device)
        optimizer = torch.optim.Adadelta(
            [p for p in (*model.parameters(), *last.parameters()) if p.requires_grad], lr=1.0, rho=0.95, eps=1e-6
        )
        generator = torch_generator(seed, stream, "order")
        best, best_state = -1.0, copy.deepcopy(model.state_dict())
        for number in range(1, config.cnn_epochs + 1):
            model.train()
            total = 0.0
            for places in _batches([len(text) for text in texts], config.cnn_batch, generator):
                rows = torch.from_numpy(token_batch([texts[i] for i in places])).to(device)
                answers = torch.tensor([labels[i] for i in places], device=device)
                logits = last(functional.dropout(model(rows), config.dropout))
                loss = functional.cross_entropy(logits, answers)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                with torch.no_grad():
                    last.weight.copy_(torch.renorm(last.weight, 2, 0, MAX_NORM))
                total += loss.item() * len(places)
            if not math.isfinite(total):
                raise TrainingError(f"{stream}, pass {number}: the loss is not finite; check text.vectors")
            accuracy = _accuracy(model, last, validation, device)
            advance({"epoch": number, "loss": total / len(texts), "validation_accuracy": accuracy})
            if accuracy > best or not validation[1]:
                best, best_state = accuracy, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_state)
    return model.eval()


def _batches(lengths: Sequence[int], batch: int, generator: torch.Generator) -> list[list[int]]:
    """Places of all texts in shuffled batches, each of texts of like length, for padding costs as much as words.

    Only texts that a shuffle brought near each other are sorted, so batches differ from pass to pass.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    near = [order[start : start + POOL * batch] for start in range(0, len(order), POOL * batch)]
    by_length = [place for pool in near for place in sorted(pool, key=lengths.__getitem__)]
    batches = [by_length[start : start + batch] for start in range(0, len(by_length), batch)]
    return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]


def text_vectors(
    reader: WordCNN | WordBag, texts: Sequence[Sequence[int]], device: torch.device, batch: int = 128
) -> Tensor:
    """Text vectors (N, reader.outputs) float32 on the CPU."""
    reader.eval()
    with torch.inference_mode():
        rows = [
            reader(torch.from_numpy(token_batch(texts[start : start + batch])).to(device)).cpu()
            for start in range(0, len(texts), batch)
        ]
    return torch.cat(rows).clone() if rows else torch.zeros(0, reader.outputs)


def _accuracy(
    model: WordCNN, last: nn.Linear, part: tuple[Sequence[Sequence[int]], Sequence[int]], device: torch.device
) -> float:
    texts, labels = part
    if not labels:
        return 0.0
    with torch.inference_mode():
        chosen = last(text_vectors(model, texts, device).to(device)).argmax(1).cpu()
    return float((chosen == torch.tensor(labels)).float().mean())
