"""The networks of T4b of HYPOTHESES.md: a segmenter and a detector of scenes, their training, and how good they are.

A scene is a canvas with up to four garments of different sizes that don't overlap. The segmenter is a small U-Net [1]_,
the detector has one stage: each cell of a grid puts out whether an object's centre lies in it, its box and its class
[2]_. Precision is averaged as in the PASCAL VOC challenge since 2010 [3]_.

References
----------
.. [1] O. Ronneberger, P. Fischer and T. Brox, "U-Net: convolutional networks for biomedical image segmentation",
   https://arxiv.org/abs/1505.04597
.. [2] J. Redmon, S. Divvala, R. Girshick and A. Farhadi, "You only look once: unified, real-time object detection",
   https://arxiv.org/abs/1506.02640
.. [3] M. Everingham et al., "The PASCAL visual object classes challenge: a retrospective", IJCV 111, 2015
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, interpolate, smooth_l1_loss
from torchvision.ops import batched_nms, box_iou

from nni_topo import zoo

SIDE = 48  # pixels of a scene
OBJECTS = 4  # at most, of a scene
SMALLEST, LARGEST = 14, 22  # pixels of a garment's side
TRIES = 20  # places that are drawn for a garment before it is left out
VISIBLE = 0.1  # of the range of pixels: what is brighter belongs to the garment
CLASSES = 10
WIDTHS = (10, 12, 14, 16)  # filters of the first convolution, by seed; later ones have twice as many
STRIDE = 8  # pixels of a cell of the detector
REFERENCE = 16.0  # pixels: sizes of boxes are learned as logarithms of their multiples
EPOCHS, BATCH, RATE = 6, 64, 2e-2
CERTAIN = 0.05  # score of a detection, at least
OVERLAP = 0.5  # intersection over union of a detection with an object, and of two detections of one object

SEGMENTER, DETECTOR = "segmentation", "detection"


@dataclass(frozen=True)
class Scenes:
    """Scenes and what is in them.

    Attributes
    ----------
    images : Tensor of shape (n, 1, SIDE, SIDE)
    pixels : Tensor of shape (n, SIDE, SIDE)
        The class of each pixel plus one, 0 for the background.
    boxes : Tensor of shape (n, OBJECTS, 4)
        Left, top, right and bottom of the visible pixels of each object.
    labels : Tensor of shape (n, OBJECTS)
        The class of each object, -1 where there are fewer.
    """

    images: Tensor
    pixels: Tensor
    boxes: Tensor
    labels: Tensor


def composed(images: Tensor, labels: Tensor, count: int, seed: int) -> Scenes:
    """Compose scenes of images (n, 1, h, w), their darkest value being black."""
    generator = torch.Generator().manual_seed(seed)
    black, white = images.min(), images.max()
    canvas = black.repeat(count, 1, SIDE, SIDE)
    pixels = torch.zeros(count, SIDE, SIDE, dtype=torch.long)
    boxes = torch.zeros(count, OBJECTS, 4)
    classes = torch.full((count, OBJECTS), -1)

    def drawn(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for scene in range(count):
        squares: list[tuple[int, int, int]] = []
        for _ in range(drawn(1, OBJECTS)):
            item, side = drawn(0, len(images) - 1), drawn(SMALLEST, LARGEST)
            for _ in range(TRIES):
                top, left = drawn(0, SIDE - side), drawn(0, SIDE - side)
                if all(_are_apart((top, left, side), other) for other in squares):
                    break
            else:
                continue
            garment = interpolate(images[item][None], (side, side), mode="bilinear", antialias=True)[0, 0]
            visible = garment > black + VISIBLE * (white - black)
            if not visible.any():
                continue
            canvas[scene, 0, top : top + side, left : left + side] = garment
            pixels[scene, top : top + side, left : left + side][visible] = labels[item] + 1
            rows, columns = visible.any(1).nonzero().flatten(), visible.any(0).nonzero().flatten()
            edges = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
            boxes[scene, len(squares)] = torch.stack(edges).float()
            classes[scene, len(squares)] = labels[item]
            squares.append((top, left, side))
    return Scenes(canvas, pixels, boxes, classes)


def _are_apart(one: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
    (top, left, side), (other_top, other_left, other_side) = one, other
    beside = left + side <= other_left or other_left + other_side <= left
    return beside or top + side <= other_top or other_top + other_side <= top


# Networks


def block(before: int, after: int, stride: int = 1) -> nn.Sequential:
    """Build a 3x3 convolution with batch norm and ReLU."""
    convolution = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU())


class Segmenter(nn.Module):
    """A U-Net of six convolutions and a head, whose outputs have half of the scene's resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = block(1, width, stride=2), block(width, 2 * width)
        self.third, self.bottom = block(2 * width, 2 * width), block(2 * width, 2 * width)
        self.up_third, self.up_second = block(4 * width, 2 * width), block(4 * width, 2 * width)
        self.pool, self.up = nn.MaxPool2d(2), nn.Upsample(scale_factor=2)
        self.head = nn.Conv2d(2 * width, CLASSES + 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits (n, CLASSES + 1, SIDE / 2, SIDE / 2) of each place; class 0 is the background."""
        second = self.second(self.first(images))
        third = self.third(self.pool(second))
        bottom = self.bottom(self.pool(third))
        risen = self.up_third(torch.cat([self.up(bottom), third], 1))
        logits: Tensor = self.head(self.up_second(torch.cat([self.up(risen), second], 1)))
        return logits


class PlaceLabeller(Segmenter):
    """The segmenter with the classes last, (n, h, w, CLASSES + 1), as the zoo's training takes labels of places."""

    def __init__(self) -> None:
        super().__init__(WIDTHS[-1])

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits of each place."""
        return super().forward(images).permute(0, 2, 3, 1)


class Detector(nn.Module):
    """Five convolutions, pooled three times, and a head that puts out an object and its box and class per cell."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = (width, 2 * width, 2 * width, 2 * width, 2 * width)
        layers: list[nn.Module] = []
        for place, (before, after) in enumerate(zip((1, *widths[:-1]), widths, strict=True)):
            layers.append(block(before, after))
            if place < 3:
                layers.append(nn.MaxPool2d(2))
        self.backbone = nn.Sequential(*layers)
        self.head = nn.Conv2d(widths[-1], 5 + CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Compute of each cell the logit of an object, its centre and size, and its classes' logits, as channels."""
        found: Tensor = self.head(self.backbone(images))
        return found


KINDS: dict[str, Callable[[int], nn.Module]] = {SEGMENTER: Segmenter, DETECTOR: Detector}


def width_of(seed: int) -> int:
    """Return how many filters the first convolution of a seed's network has."""
    return WIDTHS[seed % len(WIDTHS)]


def trained_on_scenes(kind: str, seed: int, scenes: Scenes, out: Path) -> nn.Module:
    """Return the network of a kind and a seed, trained on labelled scenes."""
    torch.manual_seed(seed)
    model = KINDS[kind](width_of(seed))
    path = out / "checkpoints" / f"{kind}-{seed}.pt"
    if path.exists():
        zoo.load_checkpoint(path, model)
    else:
        _train(model, LOSSES[kind], scenes, seed)
        zoo.save_checkpoint(path, model, {"seed": seed})
    return model.eval()


def _train(model: nn.Module, loss_of: Callable[[Tensor, Scenes, Tensor], Tensor], scenes: Scenes, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-4)
    batches = len(scenes.images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=EPOCHS * batches)
    model.train()
    for _ in range(EPOCHS):
        order = torch.randperm(len(scenes.images), generator=generator)
        for chosen in order[: batches * BATCH].split(BATCH):
            loss = loss_of(model(scenes.images[chosen]), scenes, chosen)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def segmentation_loss(logits: Tensor, scenes: Scenes, chosen: Tensor) -> Tensor:
    """Return the cross entropy of the places' classes."""
    step = SIDE // logits.shape[-1]
    return cross_entropy(logits, scenes.pixels[chosen, ::step, ::step])


def detection_loss(outputs: Tensor, scenes: Scenes, chosen: Tensor) -> Tensor:
    """Return the sum of the losses of objects, boxes and classes, each per object."""
    boxes, labels = scenes.boxes[chosen], scenes.labels[chosen]
    scene, place = (labels >= 0).nonzero(as_tuple=True)
    boxes, labels = boxes[scene, place], labels[scene, place]
    centres, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2.0, boxes[:, 2:] - boxes[:, :2]
    cells = (centres / STRIDE).long()
    is_object = torch.zeros_like(outputs[:, 0])
    is_object[scene, cells[:, 1], cells[:, 0]] = 1.0
    found = outputs[scene, :, cells[:, 1], cells[:, 0]]
    wanted = torch.cat([centres / STRIDE - cells - 0.5, (sizes / REFERENCE).log()], 1)
    objects = binary_cross_entropy_with_logits(outputs[:, 0], is_object, reduction="sum") / len(labels)
    box_loss = smooth_l1_loss(found[:, 1:5], wanted, beta=0.1, reduction="sum") / len(labels)
    return objects + box_loss + cross_entropy(found[:, 5:], labels)


LOSSES: dict[str, Callable[[Tensor, Scenes, Tensor], Tensor]] = {
    SEGMENTER: segmentation_loss,
    DETECTOR: detection_loss,
}


# What a network is worth


def outputs_for(model: nn.Module, images: Tensor) -> Tensor:
    """Return the outputs (n, channels, h, w) for scenes, as they are."""
    with torch.no_grad():
        return torch.cat([model(batch) for batch in images.split(250)])


def mean_intersection_over_union(logits: Tensor, pixels: Tensor) -> float:
    """Return the intersection over union of found and true pixels (n, h, w) of a class, over all scenes; mean of all.

    Logits (n, classes, h, w) may have another resolution.
    """
    found = interpolate(logits, pixels.shape[1:], mode="bilinear").argmax(1)
    classes = logits.shape[1]
    counts = torch.bincount((classes * pixels + found).flatten(), minlength=classes**2).view(classes, classes)
    shared = counts.diagonal().double()
    either = counts.sum(0) + counts.sum(1) - shared
    return float((shared / either)[either > 0].mean())


Detections = tuple[Tensor, Tensor, Tensor]
"""Boxes (k, 4), scores (k,) and classes (k,), the highest score first."""


def detections(outputs: Tensor) -> list[Detections]:
    """Return of each scene what a detector's outputs say, without boxes that overlap a surer one of their class."""
    _, _, rows, columns = outputs.shape
    grid = torch.meshgrid(torch.arange(columns), torch.arange(rows), indexing="xy")
    centres = (torch.stack(grid) + 0.5 + outputs[:, 1:3]) * STRIDE
    halves = outputs[:, 3:5].exp() * REFERENCE / 2.0
    boxes = torch.cat([centres - halves, centres + halves], 1).flatten(2).transpose(1, 2)
    scores = (outputs[:, :1].sigmoid() * outputs[:, 5:].softmax(1)).flatten(2).transpose(1, 2)
    found = []
    for scene_boxes, scene_scores in zip(boxes, scores, strict=True):
        cell, label = (scene_scores >= CERTAIN).nonzero(as_tuple=True)
        chosen, score = scene_boxes[cell], scene_scores[cell, label]
        kept = batched_nms(chosen, score, label, OVERLAP)
        found.append((chosen[kept], score[kept], label[kept]))
    return found


def mean_average_precision(found: list[Detections], boxes: Tensor, labels: Tensor) -> float:
    """Return the area under precision over recall of a class at an overlap of OVERLAP; mean over classes.

    A detection is right if the object of its class that it overlaps most has the overlap, and no surer detection has
    that object. Precision at a recall is the highest one at that recall or more.
    """
    right: list[Tensor] = []
    for (scene_boxes, _, classes), true_boxes, true_labels in zip(found, boxes, labels, strict=True):
        overlaps = box_iou(scene_boxes, true_boxes)
        overlaps[classes[:, None] != true_labels] = 0.0
        hits, taken = torch.zeros(len(classes), dtype=torch.bool), set()
        for place, (overlap, item) in enumerate(zip(*(each.tolist() for each in overlaps.max(1)), strict=True)):
            if overlap >= OVERLAP and item not in taken:
                hits[place] = True
                taken.add(item)
        right.append(hits)
    hit = torch.cat(right)
    score, label = torch.cat([scores for _, scores, _ in found]), torch.cat([classes for _, _, classes in found])
    areas = []
    for each in labels[labels >= 0].unique():
        mine = hit[label == each][score[label == each].argsort(descending=True, stable=True)].double()
        objects = (labels == each).sum()
        precision = mine.cumsum(0) / torch.arange(1, len(mine) + 1)
        highest = precision.flip(0).cummax(0).values.flip(0)
        areas.append(float((highest * mine).sum() / objects))
    return sum(areas) / len(areas)


def quality(kind: str, outputs: Tensor, scenes: Scenes) -> float:
    """Return the mean intersection over union of a segmenter, the mean average precision of a detector."""
    if kind == SEGMENTER:
        return mean_intersection_over_union(outputs, scenes.pixels)
    return mean_average_precision(detections(outputs), scenes.boxes, scenes.labels)
