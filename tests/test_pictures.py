"""Reading pictures from folders and tars."""

import io
import pickle
import sys
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from supermix_transforms.data.pictures import PictureFiles, read_picture


def save(path, colour=(200, 30, 30), size=(24, 24), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


# -- mixing and writing ----------------------------------------------------------------------------


def test_a_folder_is_searched_to_any_depth_in_an_order_of_the_seed(tmp_path):
    names = ["a/1.jpg", "a/2.JPEG", "b/c/3.png", "4.webp", "b/5.Png", "6.jpg"]
    for name in names:
        save(tmp_path / name)
    (tmp_path / "note.txt").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    orders = {
        seed: [name for name, _ in PictureFiles(tmp_path, size=24, seed=seed)] for seed in range(4)
    }
    assert all(sorted(order) == sorted(names) for order in orders.values())
    assert len(set(map(tuple, orders.values()))) > 1
    again = PictureFiles(tmp_path, size=24, seed=1)
    assert [name for name, _ in again] == [name for name, _ in again] == orders[1]


def test_earlier_mixes_inside_the_folder_are_left_out(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "mixes" / "k2-00000.png")
    files = PictureFiles(tmp_path, size=24, skip=tmp_path / "mixes")
    assert [name for name, _ in files] == ["a.png"]
    outer = PictureFiles(tmp_path / "mixes", size=24, skip=tmp_path)
    assert [name for name, _ in outer] == ["k2-00000.png"]


def test_pictures_are_cut_from_the_middle(tmp_path):
    wide = np.zeros((64, 192, 3), dtype=np.uint8)
    wide[:, 64:128] = 200  # the middle square
    Image.fromarray(wide).save(tmp_path / "wide.png")
    ((_, picture),) = PictureFiles(tmp_path, size=28)
    assert picture.shape == (3, 28, 28)
    assert picture.dtype == torch.uint8
    assert (picture == 200).all()


def test_a_picture_of_the_right_size_stays_as_it_is(tmp_path):
    expected = torch.randint(256, (3, 24, 24), dtype=torch.uint8)
    Image.fromarray(expected.movedim(0, -1).numpy()).save(tmp_path / "a.png")
    ((_, picture),) = PictureFiles(tmp_path, size=24)
    assert torch.equal(picture, expected)


def test_pictures_stand_upright(tmp_path):
    image = Image.new("RGB", (24, 24))
    image.paste((255, 255, 255), (0, 0, 24, 12))  # bright above
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    image.save(tmp_path / "a.png", exif=exif)
    ((_, picture),) = PictureFiles(tmp_path, size=24)
    assert picture[:, :12].max() == 0
    assert picture[:, 12:].min() == 255


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    image = Image.new("RGB", (24, 24), (255, 255, 255)).convert(mode)
    options = {"transparency": bytes([0] * 256)} if mode == "P" else {}
    image.save(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"), **options)
    ((_, picture),) = PictureFiles(tmp_path, size=24)
    assert picture.shape == (3, 24, 24)
    assert picture.min() >= 250


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_a_picture_that_can_not_be_read_is_named(tmp_path, content):
    path = save(tmp_path / "b" / "torn.jpg", size=(64, 64))
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    with pytest.raises(ValueError, match=r"got 'b/torn.jpg', which Pillow cannot read: \w+.*"):
        list(PictureFiles(tmp_path))


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO", "EPS"])
def test_what_is_no_jpeg_png_or_webp_is_an_error_whatever_its_name(tmp_path, kind):
    save(tmp_path / "a.jpg", format=kind)
    with pytest.raises(
        ValueError, match=r"'a.jpg', .* cannot read: it is none of JPEG, PNG, WEBP. "
    ):
        list(PictureFiles(tmp_path))


def test_a_jpeg_of_a_phone_is_read(tmp_path):
    Image.new("RGB", (24, 24)).save(
        tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (12, 12))]
    )
    assert [picture.shape for _, picture in PictureFiles(tmp_path, size=24)] == [(3, 24, 24)]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_huge_picture_is_an_error_before_it_is_decoded(monkeypatch, kind):
    content = encoded(size=(24, 20), kind=kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 480)
    assert read_picture("a", content).size == (24, 20)
    for most, message in (
        (479, "24 x 20 pixels are more than PIL.Image.MAX_IMAGE_PIXELS"),
        (99, ""),
    ):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        with monkeypatch.context() as within:
            within.setattr("PIL.Image.Image.load", lambda self: pytest.fail("it is decoded"))
            with pytest.raises(ValueError, match=f"'a', which Pillow cannot read: {message}"):
                read_picture("a", content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # whoever asks for it
    assert read_picture("a", content).size == (24, 20)


def pictures_with_exif() -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 72.5  # turned; the others are written
    exif.get_ifd(0x8769)[0x9000] = b"0230"
    image = Image.effect_noise((12, 9), 60).convert("RGB")
    found = []
    for kind in ("JPEG", "PNG", "WEBP"):
        for options in ({}, {"exif": exif}):
            content = io.BytesIO()
            image.save(content, kind, **options)
            found.append(content.getvalue())
    return found


def is_read(content: bytes) -> bool:
    """Whether it is an RGB picture; else the error is ours."""
    try:
        image = read_picture("a", content)
    except ValueError as error:
        if not str(error).startswith("images: expected a picture, got 'a', which Pillow cannot"):
            raise
        return False
    assert image.mode == "RGB"
    return True


damaged = pytest.mark.filterwarnings(
    "ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning"
)


@damaged
@pytest.mark.parametrize("content", pictures_with_exif()[1::2], ids=["JPEG", "PNG", "WEBP"])
def test_a_picture_with_one_byte_changed_is_an_error_or_a_picture(content):
    read = [is_read(content[:n] + b"\1" + content[n + 1 :]) for n in range(len(content))]
    assert {*read} == {True, False}


@damaged
@given(
    content=st.sampled_from(pictures_with_exif()),
    changes=st.lists(st.tuples(st.integers(0, 1 << 11), st.integers(0, 255)), max_size=4),
    cut=st.none() | st.integers(0, 1 << 10),
)
def test_a_picture_with_any_bytes_changed_or_cut_is_an_error_or_a_picture(content, changes, cut):
    changed = bytearray(content)
    for place, byte in changes:
        changed[place % len(changed)] = byte
    is_read(bytes(changed[:cut]))


def test_a_folder_without_pictures_is_an_error(tmp_path):
    (tmp_path / "note.txt").touch()
    with pytest.raises(ValueError, match=r"images: expected pictures \(.jpg, .jpeg, .png, .webp\)"):
        list(PictureFiles(tmp_path))


def test_a_path_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"got '.*nowhere', which is not there. Check the path"):
        PictureFiles(tmp_path / "nowhere")


def test_a_size_of_no_pixels_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="size: expected at least 1 pixel, got 0"):
        PictureFiles(tmp_path, size=0)


class Bomb:
    """Tells when it is unpickled."""

    def __reduce__(self):
        return (exec, ("import sys; sys.bomb_went_off = True",))


def write_tar(path, members: dict[str, bytes]):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def encoded(colour=(200, 30, 30), size=(24, 24), kind="PNG") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, colour).save(content, kind)
    return content.getvalue()


def test_a_tar_gives_its_pictures_and_opens_no_pickle(tmp_path):
    members = {
        "n/1.png": encoded((250, 0, 0)),
        "n/1.cls": b"7",
        "n/1.pyd": pickle.dumps(Bomb()),
        "n/1.pth": pickle.dumps(Bomb()),
        "n/2.png": encoded((0, 250, 0)),
        "n/2.json": b"not even JSON",
        "n/3.input.PNG": encoded((0, 0, 250)),
    }
    files = PictureFiles(write_tar(tmp_path / "shard: 1#2?.tar", members), size=24)
    assert [name for name, _ in files] == ["n/1.png", "n/2.png", "n/3.input.PNG"]
    assert [picture[:, 0, 0].tolist() for _, picture in files] == [
        [250, 0, 0],
        [0, 250, 0],
        [0, 0, 250],
    ]
    assert not hasattr(sys, "bomb_went_off")


def test_a_torn_picture_in_a_tar_is_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"1.png": encoded(), "2.png": encoded()[:-30]})
    with pytest.raises(ValueError, match=r"got '2.png', which Pillow cannot read"):
        list(PictureFiles(path, size=24))


@pytest.mark.parametrize("content", [b"no tar at all" * 99, b""])
def test_a_file_that_is_no_tar_is_an_error(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"images: expected a whole .*tar file, got '.*a.tar'"):
        list(PictureFiles(tmp_path / "a.tar"))


def test_a_tar_that_is_cut_or_damaged_is_an_error_after_the_pictures_before(tmp_path):
    path = write_tar(tmp_path / "a.tar", {f"{i}.png": encoded() for i in range(4)})
    content = path.read_bytes()
    header = content.index(b"2.png")
    for damaged in (content[:header], content[: header + 99], content.replace(b"2.png", b"x.png")):
        path.write_bytes(damaged)
        pictures = iter(PictureFiles(path, size=24))
        assert [next(pictures)[0] for _ in range(2)] == ["0.png", "1.png"]
        with pytest.raises(
            ValueError, match=r"images: expected a whole tar file, got '.*a.tar' of"
        ):
            next(pictures)


def test_a_tar_without_pictures_is_an_error(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"1.txt": b"words", "1.cls": b"3"})
    with pytest.raises(ValueError, match="expected pictures"):
        list(PictureFiles(path))


def test_a_tar_may_be_left_half_read(tmp_path):
    path = write_tar(tmp_path / "a.tar", {f"{i}.png": encoded() for i in range(9)})
    assert next(iter(PictureFiles(path, size=24)))[0] == "0.png"


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_pictures_of_16_bits_keep_their_shades(dtype):
    levels = np.linspace(0, 65535, 256).round().astype("<u2").reshape(16, 16)
    content = io.BytesIO()
    Image.fromarray(levels.astype(dtype)).save(content, "PNG")
    found = np.asarray(read_picture("a.png", content.getvalue()))
    assert found.shape == (16, 16, 3)
    assert np.abs(found[..., 0].astype(int) - (levels / 257)).max() <= 1
