"""The adapters of transformers' panoptic models: tiny random models, and a slow statement."""

from __future__ import annotations

import json
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_segmenters import FAMILIES, config, image_processor, picture, save

from collavo.panoptic import (
    CLASS_NAMES,
    PanopticMap,
    TransformersSegmenter,
    detections_from_map,
    segmenters,
)
from tests.fuzz.picture_files import exif_bytes

pytest.importorskip("scipy", reason="transformers' panoptic models need scipy")

SURE = {"threshold": 0.0, "mask_threshold": 0.0, "overlap_threshold": 0.0}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return cache(lambda family: save(family, tmp_path_factory.mktemp(family)))


@pytest.fixture
def segmenter(family, folders):
    return TransformersSegmenter.from_pretrained(folders(family), grid=(6, 9), **SURE)


def outputs_of(classes, masks):
    return SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)


@cache
def adapter(family):
    """An adapter without a network: only its post-processing is asked for."""
    model = torch.nn.Module()
    model.config = config(family)
    return TransformersSegmenter(model, image_processor(family))


# A slow statement of the post-processing, in float64.


def weights(source, target, antialias):
    """How much of each source pixel goes into each target pixel, ``[target, source]``."""
    scale = source / target
    reach = max(scale, 1.0) if antialias else 1.0
    table = np.zeros((target, source))
    for i in range(target):
        centre = (i + 0.5) * scale
        if antialias:
            for j in range(source):
                table[i, j] = max(0.0, 1 - abs(j + 0.5 - centre) / reach)
            table[i] /= table[i].sum()
        else:  # the two neighbours, the border repeated
            position = max(centre - 0.5, 0.0)
            low = min(int(position), source - 1)
            table[i, low] += 1 - (position - low)
            table[i, min(low + 1, source - 1)] += position - low
    return table


def resized(masks, size, antialias=False):
    down = weights(masks.shape[1], size[0], antialias)
    across = weights(masks.shape[2], size[1], antialias)
    return np.stack([down @ mask @ across.T for mask in masks])


def slow_post_process(family, classes, masks, size, threshold, mask_threshold, overlap):
    masks = masks.astype(np.float64)
    if family == "mask2former":
        masks = resized(masks, (384, 384))
    probabilities = resized(1 / (1 + np.exp(-masks)), size, antialias=family == "oneformer")
    exponent = np.exp(classes.astype(np.float64) - classes.max(-1, keepdims=True))
    scores = exponent / exponent.sum(-1, keepdims=True)
    queries = [
        (int(row.argmax()), row.max(), mask)
        for row, mask in zip(scores, probabilities, strict=True)
        if row.argmax() != len(row) - 1 and row.max() > threshold
    ]
    ids = np.zeros(size, dtype=np.int64)
    labels = []
    if queries:
        weighted = np.stack([score * mask for _, score, mask in queries])
        winner = weighted.argmax(0)
        for k, (label, _, _) in enumerate(queries):
            cells, sure = (winner == k).sum(), (weighted[k] >= mask_threshold).sum()
            # In float32, as transformers divides: 8 of 10 cells are more than 0.8 there.
            if cells and sure and float(np.float32(cells) / np.float32(sure)) > overlap:
                labels.append(label)
                ids[winner == k] = len(labels)
    return ids, labels


def is_close_call(family, classes, masks, size, threshold, mask_threshold):
    """Whether float32 may decide otherwise than float64: a cell or a score near a border of two."""
    near = 1e-5  # some ten roundings of numbers up to 1
    scores = torch.from_numpy(classes).double().softmax(-1).numpy()
    named = (scores.argmax(-1) != scores.shape[-1] - 1) & (scores.max(-1) > threshold)
    masks = masks.astype(np.float64)
    if family == "mask2former":
        masks = resized(masks, (384, 384))
    shares = resized(1 / (1 + np.exp(-masks)), size, antialias=family == "oneformer")
    weighted = (scores.max(-1)[:, None, None] * shares)[named]
    best = np.sort(weighted, axis=0)[-2:]
    borders = [np.abs(scores.max(-1) - threshold), np.diff(best, axis=0)]
    if mask_threshold > 0:
        borders.append(np.abs(weighted - mask_threshold))
    return any(bool((border < near).any()) for border in borders)


def random_outputs(seed, images=1, queries=6, size=(10, 12)):
    """Logits of blobs, some queries sure of their class, some of none, some of nothing."""
    make = np.random.default_rng(seed)
    coarse = torch.from_numpy(make.normal(size=(images, queries, 3, 4))).float() * 12
    masks = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")
    classes = torch.from_numpy(make.normal(size=(images, queries, 134))).float()
    for image in range(images):
        for query in range(queries):
            label = make.choice([17, 17, 0, 119, 133])
            classes[image, query, label] += float(make.choice([4, 7, 12]))
    return classes, masks


@given(
    st.sampled_from(FAMILIES),
    st.integers(0, 10**6),
    st.sampled_from([(35, 35), (24, 24), (7, 5), (1, 1), (40, 61)]),
    st.sampled_from([0.0, 0.5, 0.9]),
    st.sampled_from([0.0, 0.5, 0.95]),
    st.sampled_from([0.0, 0.8]),
)
@example("maskformer", 420, (35, 35), 0.5, 0.5, 0.8)  # 8 of 10 cells
@settings(max_examples=60, derandomize=True, deadline=None)
def test_post_processing_against_a_slow_statement(
    family, seed, size, threshold, mask_threshold, overlap
):
    segmenter = adapter(family)
    segmenter.threshold, segmenter.mask_threshold = threshold, mask_threshold
    segmenter.overlap_threshold = overlap
    classes, masks = random_outputs(seed, images=2)
    for row, mask, own in zip(classes.numpy(), masks.numpy(), (size, (9, 4)), strict=True):
        assume(not is_close_call(family, row, mask, own, threshold, mask_threshold))
    found = segmenter.post_process(outputs_of(classes, masks), [size, (9, 4)])
    for one, row, mask, own in zip(found, classes, masks, (size, (9, 4)), strict=True):
        ids, labels = slow_post_process(
            family, row.numpy(), mask.numpy(), own, threshold, mask_threshold, overlap
        )
        assert np.array_equal(one.segmentation.numpy(), ids)
        assert one.segment_ids.tolist() == list(range(1, len(labels) + 1))
        assert one.segment_classes.tolist() == labels


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("size", [(35, 35), (50, 61)])
def test_post_processing_is_transformers_own(family, seed, size):
    """Bit for bit, where transformers can do it: OneFormer's needs torchvision."""
    if family == "oneformer":
        pytest.importorskip("torchvision", reason="transformers' OneFormer needs torchvision")
    segmenter = adapter(family)
    segmenter.threshold, segmenter.mask_threshold = 0.5, 0.95 if seed % 2 else 0.6
    segmenter.overlap_threshold = 0.8
    outputs = outputs_of(*random_outputs(seed, images=3, size=(24, 32)))
    theirs = segmenter.processor.post_process_panoptic_segmentation(
        outputs, threshold=0.5, mask_threshold=segmenter.mask_threshold, label_ids_to_fuse=set(),
        target_sizes=[size] * 3,
    )  # fmt: skip
    ours = segmenter.post_process(outputs, [size] * 3)
    assert sum(one.num_segments for one in ours) > 0, "the case must say something"
    for one, result in zip(ours, theirs, strict=True):
        assert torch.equal(one.segmentation, result["segmentation"].clamp_min(0).int())
        assert one.segment_ids.tolist() == [info["id"] for info in result["segments_info"]]
        labels = [info["label_id"] for info in result["segments_info"]]
        assert one.segment_classes.tolist() == labels


def test_the_papers_settings():
    """No fusing, and 0.95 of score times probability in some cell."""
    masks = torch.full((1, 3, 16, 16), -10.0)
    masks[0, 0, :, :8] = 10.0
    masks[0, 1, :8, 8:] = 10.0
    masks[0, 2, 8:, 8:] = 10.0
    classes = torch.zeros(1, 3, 134)
    classes[0, 0, 17] = classes[0, 1, 17] = 20.0  # certain: two horses, not fused
    classes[0, 2, 119] = 6.5  # score 0.83: above 0.5, but no cell's product reaches 0.95
    model = torch.nn.Module()
    model.config = config("mask2former")
    segmenter = TransformersSegmenter(model, image_processor("mask2former"))
    (panoptic,) = segmenter.post_process(outputs_of(classes, masks), [segmenter.grid])
    assert panoptic.size == (35, 35) and panoptic.segmentation.dtype == torch.int32
    assert [(d.name, d.number) for d in detections_from_map(panoptic)] == [
        ("horse", 1),
        ("horse", 2),
    ]
    (nothing,) = segmenter.post_process(outputs_of(classes * 0, masks), [(3, 4)])
    assert nothing.num_segments == 0 and nothing.segmentation.eq(0).all()


def test_from_a_folder(segmenter, folders, family):
    """Saved and read as a user's would be, by the config's own type; then an image goes through."""
    assert type(segmenter.model).__name__.lower().startswith(family)
    assert not segmenter.model.training
    panoptic = PanopticMap.from_segmenter(segmenter, picture(40, 30).convert("L"))
    assert panoptic.size == (6, 9) and panoptic.num_segments > 0
    full = TransformersSegmenter.from_pretrained(folders(family), grid=None, **SURE)
    panoptic = full(picture(40, 30))
    assert panoptic.size == (30, 40) and panoptic.num_segments > 0
    panoptic.segmentation.add_(1)  # an ordinary tensor, not one of inference mode
    # Random weights reach none of the paper's thresholds: every cell is unknown.
    assert TransformersSegmenter.from_pretrained(folders(family))(picture(9, 9)).num_segments == 0


def test_half_precision(folders, family):
    segmenter = TransformersSegmenter.from_pretrained(
        folders(family), grid=(6, 9), dtype=torch.bfloat16, **SURE
    )
    assert segmenter.model.dtype == torch.bfloat16
    assert segmenter(picture(40, 30)).num_segments > 0


def test_a_batch_is_its_images(segmenter):
    """Sizes that differ go through the model apart, so none is padded; the order stays."""
    segmenter.grid = None
    images = [picture(40, 30, 1), picture(30, 40, 2), picture(40, 30, 3), picture(80, 20, 4)]
    sizes = []
    inner = segmenter.model.forward

    def forward(**inputs):
        assert inputs["pixel_mask"].all()
        sizes.append(len(inputs["pixel_values"]))
        return inner(**inputs)

    segmenter.model.forward = forward
    together = segmenter.batch(images)
    assert sizes == [2, 1, 1]
    for one, image in zip(together, images, strict=True):
        alone = segmenter(image)
        assert one.size == alone.size == (image.height, image.width)
        assert torch.equal(one.segmentation, alone.segmentation)
        assert torch.equal(one.segment_classes, alone.segment_classes)
    assert segmenter.batch([]) == []


def test_a_turned_photo_is_segmented_as_it_is_shown(segmenter, tmp_path):
    """Whether the path or the opened file is given; the map has the shown size."""
    segmenter.grid = None
    shown, path = picture(30, 40), tmp_path / "photo.png"
    shown.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif_bytes(6))
    expected = segmenter(shown)
    assert expected.size == (shown.height, shown.width)
    for image in (path, Image.open(path)):
        assert torch.equal(segmenter(image).segmentation, expected.segmentation)


def test_oneformer_is_told_the_task_and_put_out_of_training(tmp_path):
    """With the flag of its config it would ask for texts, and drop out at random."""
    segmenter = TransformersSegmenter.from_pretrained(
        save("oneformer", tmp_path, is_training=True), grid=(6, 9), **SURE
    )
    seen = []
    segmenter.model.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(inputs["task_inputs"]), with_kwargs=True
    )
    first, second = (segmenter(picture(40, 30)) for _ in range(2))
    assert torch.equal(first.segmentation, second.segmentation)
    assert segmenter.processor.tokenizer.decode(seen[0][0]).strip().endswith("the task is panoptic")


def test_labels_are_found_by_name(folders):
    """A model with its own order, or with some of the classes only."""
    own = config("mask2former", num_labels=2, id2label={0: "sky", 1: "hair drier"}, label2id={})
    assert segmenters._classes(own) == [119, 78]
    backwards = dict(enumerate(reversed(CLASS_NAMES)))
    assert segmenters._classes(config("maskformer", id2label=backwards, label2id={})) == list(
        range(132, -1, -1)
    )
    # Without names, or with one that is spelled otherwise, the order is COCO's.
    spelled = dict(enumerate(CLASS_NAMES)) | {78: "hair dryer"}
    assert segmenters._classes(config("maskformer")) == list(range(133))
    named = config("maskformer", id2label=spelled, label2id={})
    assert segmenters._classes(named) == list(range(133))


def test_labels_of_other_data_sets_are_said_by_the_user():
    model = torch.nn.Module()
    model.config = config("mask2former", num_labels=2, id2label={0: "car", 1: "door"}, label2id={})
    classes = torch.zeros(1, 2, 3)
    classes[0, 0, 1] = classes[0, 1, 0] = 20
    masks = torch.full((1, 2, 8, 8), -9.0)
    masks[0, 0, :4] = masks[0, 1, 4:] = 9
    segmenter = TransformersSegmenter(model, None, grid=(2, 1), classes=[2, -1])
    (panoptic,) = segmenter.post_process(outputs_of(classes, masks), [(2, 1)])
    assert panoptic.segmentation.tolist() == [[1], [2]]
    assert panoptic.segment_classes.tolist() == [-1, 2]


@pytest.mark.parametrize(
    ("changes", "kwargs", "message"),
    [
        ({"num_labels": 7}, {}, "the 133 labels of COCO panoptic, got 7 labels with 'LABEL_0'"),
        ({"num_labels": 2, "id2label": {0: "car", 1: "lamp"}, "label2id": {}}, {},
         r"got 2 labels with 'lamp'; say with classes= which"),
        ({}, {"classes": [0]}, "classes: expected one for each of the model's 133 labels, got 1"),
        ({}, {"classes": [133] * 133}, r"classes: expected -1\.\.132, got"),
        ({}, {"grid": (0, 5)}, r"grid: expected a positive height and width or None, got \(0, 5\)"),
        ({}, {"grid": (5,)}, "grid: expected a positive height and width"),
    ],
)  # fmt: skip
def test_wrong_models_and_grids_are_named(changes, kwargs, message):
    model = torch.nn.Module()
    model.config = config("mask2former", **changes)
    with pytest.raises(ValueError, match=message):
        TransformersSegmenter(model, None, **kwargs)


def test_other_families_are_named(tmp_path):
    model = torch.nn.Module()
    model.config = SimpleNamespace(model_type="detr")
    message = "model: expected one of the types mask2former, maskformer, oneformer, got 'detr'"
    with pytest.raises(ValueError, match=message):
        TransformersSegmenter(model, None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ValueError, match="maskformer, oneformer, got 'clip'"):
        TransformersSegmenter.from_pretrained(str(tmp_path))
    with pytest.raises(OSError, match="nowhere"):
        TransformersSegmenter.from_pretrained(str(tmp_path / "nowhere"), local_files_only=True)


def test_a_processor_that_pads_is_refused(segmenter, family):
    """Its masks would be those of a larger image, and the map shifted."""
    if family == "oneformer":
        pytest.skip("OneFormer's processor pads to the largest image only")
    padding = image_processor(family, pad_size={"height": 128, "width": 128})
    wrong = TransformersSegmenter(segmenter.model, padding)
    with pytest.raises(ValueError, match="processor: expected one that resizes without padding"):
        wrong(picture(40, 30))


def test_settings_say_all_that_decides_the_map(segmenter, folders, family, tmp_path):
    def same():
        return json.dumps(segmenter.settings, sort_keys=True)

    first = same()
    again = TransformersSegmenter.from_pretrained(
        save(family, tmp_path), grid=(6, 9), **SURE
    )  # the same model in another folder
    assert json.dumps(again.settings, sort_keys=True) == first
    seen = {first}
    for name, value in (
        ("grid", None), ("grid", (9, 6)), ("threshold", 0.3), ("mask_threshold", 0.3),
        ("overlap_threshold", 0.3), ("classes", [0] * 133),
    ):  # fmt: skip
        old = getattr(segmenter, name)
        setattr(segmenter, name, value)
        seen.add(same())
        setattr(segmenter, name, old)
    image_processor_ = getattr(segmenter.processor, "image_processor", segmenter.processor)
    image_processor_.image_mean = [0.1, 0.2, 0.3]
    seen.add(same())
    segmenter.model.config.dropout = 0.25
    seen.add(same())
    assert len(seen) == 9


def test_weights_are_hashed_once_and_again_when_they_change(segmenter, monkeypatch):
    counted = []
    hash_tensors = segmenters._hash_tensors
    monkeypatch.setattr(
        segmenters, "_hash_tensors", lambda named: counted.append(1) or hash_tensors(named)
    )
    segmenter(picture(40, 30))
    assert not counted, "nobody has asked"
    first = segmenter.settings["weights"]
    assert segmenter.settings["weights"] == first and len(counted) == 1
    original = {key: value.clone() for key, value in segmenter.model.state_dict().items()}
    with torch.no_grad():
        next(segmenter.model.parameters()).view(-1)[0] += 1
    changed = segmenter.settings["weights"]
    assert changed != first
    segmenter.model.load_state_dict(original)
    assert segmenter.settings["weights"] == first
    segmenter.model.load_state_dict(
        {key: value.half() for key, value in original.items()}, assign=True
    )
    assert segmenter.settings["weights"] not in (first, changed)
