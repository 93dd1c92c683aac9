"""Mixed shards, read by others: webdataset, timm, Hugging Face datasets."""

import json
import warnings

import numpy as np
import pytest
import torch
from colours import NUM_CLASSES, colour_teacher
from tars import picture, write_colours, write_tar
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from supermix_transforms import ShardDataset, SolverSettings, TeacherLabeler, generate
from supermix_transforms.offline.mixedshards import decoded, encode_pictures

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT = 22
FORMATS = ["png", "webp", "jpg"]
ONLY = [*FORMATS, "cls", "json", "soft.json", "soft.npy"]  # what docs/shards.md decodes


@pytest.fixture(scope="module", params=FORMATS)
def mixed(request, tmp_path_factory):
    """A folder of mixed shards, and the suffix of its pictures."""
    folder = tmp_path_factory.mktemp(request.param)
    write_colours(folder, COUNT)
    dataset = ShardDataset(folder, transform=v2.RandomCrop(16, padding=2))
    out = folder / "mixed"
    generate(
        dataset,
        colour_teacher(),
        out,
        form="shards",
        picture_format=request.param,
        quality=60,
        top=2,
        batch_size=6,
        unit_batches=2,
    )
    return out, request.param


def tars(folder) -> list[str]:
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def expected(picture: torch.Tensor) -> torch.Tensor:
    """The teacher's probabilities for a picture as it is read."""
    return TeacherLabeler(colour_teacher())(picture[None]).probs[0]


def check_label(label: dict, probs: torch.Tensor) -> None:
    """Whether a soft.json is of these probabilities (N,)."""
    kept = torch.tensor(label["log_probs"]).exp()
    assert label["indices"] == probs.topk(2).indices.tolist()
    assert torch.allclose(kept, probs[label["indices"]], atol=2e-3)
    assert label["rest"] == pytest.approx(1 - float(kept.sum()), abs=2e-3)


def read_by_datasets(folder, cache) -> list[dict]:
    """As docs/shards.md says."""
    datasets = pytest.importorskip("datasets")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # datasets' own
        found = datasets.load_dataset(
            "webdataset", data_files=f"{folder}/*.tar", split="train", cache_dir=str(cache)
        )
        return [found[number] for number in range(len(found))]


def test_webdataset_reads_picture_class_soft_label_and_sources(mixed):
    import webdataset as wds

    folder, suffix = mixed
    samples = list(wds.WebDataset(tars(folder), shardshuffle=False).decode("pil", only=ONLY))
    assert len(samples) == COUNT
    for sample in samples:
        probs = expected(pil_to_tensor(sample[suffix]))
        source = sample["json"]
        assert sample["cls"] == int(probs.argmax())
        check_label(sample["soft.json"], probs)
        assert source.keys() == {"sources", "crops", "weights", "outcome", "steps", "pass"}
        assert len(source["sources"]) == len(source["weights"]) == len(source["crops"]) == 2
        assert sum(source["weights"]) == pytest.approx(1, abs=1e-5)
        assert source["sources"][0].startswith("colours-")
    own = [sample["json"]["sources"][0] for sample in samples]
    assert len(set(own)) == COUNT  # each once


def test_timm_reads_picture_and_class_and_leaves_the_soft_label(mixed):
    from timm.data import create_dataset

    folder, _ = mixed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's and webdataset's own
        dataset = create_dataset(
            "wds/",
            root=str(folder),
            split="train",
            is_training=False,
            batch_size=4,
        )
        samples = list(dataset)
    assert len(dataset) == COUNT
    assert len(samples) == COUNT
    for image, label in samples:
        assert type(label) is int
        assert label == int(expected(pil_to_tensor(image)).argmax())


def test_hugging_face_datasets_reads_picture_class_soft_label_and_sources(mixed, tmp_path):
    folder, suffix = mixed
    rows = read_by_datasets(folder, tmp_path)
    assert len(rows) == COUNT
    for row in rows:
        probs = expected(pil_to_tensor(row[suffix]))
        assert row["cls"] == int(probs.argmax())
        check_label(row["soft.json"], probs)
        assert row["json"]["sources"][0].startswith("colours-")


def test_a_whole_label_is_an_array_to_webdataset_and_datasets(tmp_path):
    import webdataset as wds

    write_colours(tmp_path, COUNT)
    dataset = ShardDataset(tmp_path, transform=v2.CenterCrop(16))
    out = tmp_path / "out"
    generate(dataset, colour_teacher(), out, form="shards", top=None, batch_size=11)
    samples = list(wds.WebDataset(tars(out), shardshuffle=False).decode("pil", only=ONLY))
    rows = read_by_datasets(out, tmp_path / "cache")
    assert len(samples) == len(rows) == COUNT
    for sample, row in zip(samples, rows, strict=True):
        assert sample["soft.npy"].shape == (NUM_CLASSES,)
        assert sample["soft.npy"].dtype == np.float16
        probs = expected(pil_to_tensor(sample["png"]))
        assert np.allclose(sample["soft.npy"], probs.numpy(), atol=1e-3)
        assert row["soft.npy"] == sample["soft.npy"].tolist()


def test_they_are_shards_of_ours_too(mixed):
    folder, _ = mixed
    dataset = ShardDataset(folder)
    assert len(dataset) == COUNT
    picture, label = dataset[0]
    assert label == int(expected(pil_to_tensor(picture)).argmax())


def test_the_list_for_timm_has_every_shard(mixed):
    folder, _ = mixed
    split = json.loads((folder / "_info.json").read_text())["splits"]["train"]
    assert split["num_samples"] == sum(split["shard_lengths"]) == COUNT
    assert split["filenames"] == [path.rpartition("/")[2] for path in tars(folder)]


@pytest.mark.parametrize("suffix", FORMATS)
def test_quality_and_size(suffix):
    smooth = torch.nn.functional.interpolate(torch.rand(2, 3, 4, 4), 64, mode="bicubic")
    images = (255 * smooth.clamp(0, 1)).to(torch.uint8)
    files = {quality: encode_pictures(images, suffix, quality) for quality in (10, 90)}
    errors = {
        quality: (decoded(some).float() - images.float()).abs().mean()
        for quality, some in files.items()
    }
    if suffix == "png":
        assert errors[10] == errors[90] == 0
    else:
        assert errors[90] < errors[10] < 25
        assert sum(map(len, files[90])) > sum(map(len, files[10]))


@pytest.mark.parametrize("picture_format", ["jpg", "png"])
def test_mixes_of_two_pictures_of_one_class_stay_converged(tmp_path, picture_format):
    red = [
        (f"{n}.{suffix}", content)
        for n in range(6)
        for suffix, content in (("png", picture(200 + n, size=(16, 16))), ("cls", b"0"))
    ]
    write_tar(tmp_path / "a.tar", red)
    dataset = ShardDataset(tmp_path, transform=v2.CenterCrop(16))
    options = {"form": "shards", "picture_format": picture_format, "batch_size": 6}
    summary = generate(dataset, colour_teacher(), tmp_path / "out", **options)
    assert summary.mixes == summary.converged == 6


def test_mixes_that_encoding_ruins_are_dropped_where_that_is_asked(tmp_path, monkeypatch):
    def ruin(images, *options):
        images = images.clone()
        images[0] = 0
        return encode_pictures(images, *options)

    monkeypatch.setattr("supermix_transforms.offline.forms.encode_pictures", ruin)
    write_colours(tmp_path, 22)
    dataset = ShardDataset(tmp_path, transform=v2.CenterCrop(16))
    options = {"form": "shards", "picture_format": "jpg", "batch_size": 11}
    options["settings"] = SolverSettings(mask_size=4)
    kept = generate(dataset, colour_teacher(), tmp_path / "kept", **options)
    assert kept.converged < kept.mixes == 22
    dropped = generate(
        dataset, colour_teacher(), tmp_path / "dropped", unconverged="drop", **options
    )
    assert dropped.mixes == dropped.converged == kept.converged
