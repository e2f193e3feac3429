"""Two tokenizations of one text, token by token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

from collavo.loss_masks.answers import FREE, OTHERS


class Folded(NamedTuple):
    """A sequence whose image tokens in a row are one entry.

    Attributes:
        ids: Token ids.
        counts: How many tokens each entry stands for.
        trained: How many of them have a label.
    """

    ids: list[int]
    counts: list[int]
    trained: list[int]


def fold(ids: Sequence[int], trained: Sequence[bool], images: Collection[int]) -> Folded:
    """Fold a sequence's image tokens.

    Args:
        ids: Token ids.
        trained: Whether each has a label.
        images: The ids of image tokens.

    Example:
        >>> fold([5, 9, 9, 9, 6], [False, True, True, False, True], {9})
        Folded(ids=[5, 9, 6], counts=[1, 3, 1], trained=[0, 2, 1])
    """
    own, labels = list(ids), [int(label) for label in trained]
    made = Folded([], [], [])
    start = 0
    while start < len(own):
        rest = (own.index(token, start) for token in images if token in own[start:])
        place = min(rest, default=len(own))
        stop = place
        while stop < len(own) and own[stop] == own[place]:
            stop += 1
        made.ids.extend(own[start:place])
        made.counts.extend([1] * (place - start))
        made.trained.extend(labels[start:place])
        if stop > place:
            made.ids.append(own[place])
            made.counts.append(stop - place)
            made.trained.append(sum(labels[place:stop]))
        start = stop
    return made


class Alignment:
    """Two tokenizations of one text, beside each other.

    Args:
        ids: Tokens of which things are known.
        others: The tokens in question.
        is_blank: Whether a token is nothing but blanks.

    Example:
        >>> known = [0, 0, 1, 1]
        >>> Alignment([1, 2, 3, 4], [7, 1, 2, 30, 31], lambda token: token == 7).carry(known)
        [0, 0, 0, 1, 1]
        >>> Alignment([1, 2, 3], [1, 23], lambda token: False).carry([0, 0, 1])
        [0, 2]
    """

    def __init__(
        self, ids: Sequence[int], others: Sequence[int], is_blank: Callable[[int], bool]
    ) -> None:
        self.others = others
        self.is_blank = is_blank
        most = min(len(ids), len(others))
        same = next((i for i in range(most) if ids[i] != others[i]), most)
        most -= same
        back = next((i for i in range(most) if ids[-1 - i] != others[-1 - i]), most)
        last, stop = len(ids) - back, len(others) - back
        self._steps = [("equal", 0, same, 0, same)]
        if last > same or stop > same:
            matcher = SequenceMatcher(None, ids[same:last], others[same:stop], autojunk=False)
            self._steps += [
                (kind, i + same, j + same, k + same, n + same)
                for kind, i, j, k, n in matcher.get_opcodes()
            ]
        self._steps.append(("equal", last, len(ids), stop, len(others)))

    def carry(self, values: Sequence[int]) -> list[int]:
        """Return what the other tokens are.

        One that holds characters of two kinds, and a blank that the known tokenization writes in
        another way, are ``FREE``.

        Args:
            values: What each known token is.
        """
        made: list[int] = []
        # What only the other has takes after its neighbours: a prefix's blank, a token at an end.
        edges = [OTHERS, *values, FREE if values[-1:] != [OTHERS] else OTHERS]
        for step, first, last, start, stop in self._steps:
            if step == "equal":
                made += values[first:last]
            elif stop > start:
                found = set(values[first:last]) or set(edges[first : first + 2])
                only = found.pop() if len(found) == 1 else FREE
                replaced = step == "replace"
                made += [
                    FREE if replaced and self.is_blank(one) else only
                    for one in self.others[start:stop]
                ]
        return made


class Wrong(NamedTuple):
    """How many tokens a way of making labels gets wrong, in one conversation or many.

    Attributes:
        tokens: All tokens.
        too_many: Those with a label that nobody is to learn.
        too_few: Those without a label that are to be learned.
        image_tokens: Image tokens among ``too_many``.
    """

    tokens: int = 0
    too_many: int = 0
    too_few: int = 0
    image_tokens: int = 0

    def plus(self, other: Wrong) -> Wrong:
        """Return the sums.

        Args:
            other: Of other conversations.
        """
        return Wrong(*(own + more for own, more in zip(self, other, strict=True)))


NONE_WRONG = Wrong()
"""Nothing counted."""


def count_wrong(labelled: Folded, kinds: Sequence[int], images: Collection[int]) -> Wrong:
    """Compare labels with what is to be learned.

    Args:
        labelled: Tokens and labels. The first has no loss whatever its label is.
        kinds: What each entry is.
        images: The ids of image tokens.
    """
    many = few = seen = 0
    for place, (token, count, trained, kind) in enumerate(zip(*labelled, kinds, strict=True)):
        if kind == OTHERS and trained:
            extra = trained - (place == 0)
            many += extra
            seen += extra if token in images else 0
        elif kind == 1:
            few += count - trained
    return Wrong(sum(labelled.counts), many, few, seen)


def first_wrong(labelled: Folded, kinds: Sequence[int]) -> tuple[list[int], bool] | None:
    """Return the ids of the first wrong stretch and whether they have labels too many.

    Args:
        labelled: Tokens and labels.
        kinds: What each entry is.
    """
    ids: list[int] = []
    many = False
    for place, (token, count, trained, kind) in enumerate(zip(*labelled, kinds, strict=True)):
        extra = kind == OTHERS and trained > 0 and place > 0
        if extra or (kind == 1 and trained < count):
            if ids and many != extra:
                break
            many = extra
            ids.append(token)
        elif ids and kind != FREE:
            break
    return (ids, many) if ids else None
