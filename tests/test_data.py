"""Data sources: the tensors equal the content of the files, and a bad source is named with its remedy."""

from __future__ import annotations

import gzip
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from antdiff._folders import locked
from antdiff.data import ImageData, load_data, sources, to_uint8, to_unit
from antdiff.data.folders import find_images
from antdiff.train.data import Batches


def test_digits_are_scikit_learns_with_a_fixed_stratified_split() -> None:
    from sklearn.datasets import load_digits

    digits = load_data("digits")
    assert digits.shape == (1, 8, 8)
    assert digits.train.dtype == torch.uint8
    assert (len(digits.train), len(digits.held_out)) == (1347, 450)
    original = load_digits().images
    # Every image of the package is in exactly one part, and 0..16 became 0..255.
    together = torch.cat([digits.train, digits.held_out]).flatten(1).numpy()
    expected = np.rint(original.reshape(len(original), -1) * (255 / 16)).astype(np.uint8)
    assert sorted(map(bytes, together)) == sorted(map(bytes, expected))
    assert digits.train_labels is not None
    assert digits.held_out_labels is not None
    shares = [labels.bincount() / len(labels) for labels in (digits.train_labels, digits.held_out_labels)]
    torch.testing.assert_close(*shares, atol=1 / 450, rtol=0)  # stratified, to within one image per class
    assert torch.equal(load_data("digits").train, digits.train)


def test_mnist_comes_whole_from_its_package() -> None:
    mnist = load_data("mnist")
    assert mnist.shape == (1, 28, 28)
    assert (len(mnist.train), len(mnist.held_out)) == (4000, 1000)
    assert int(mnist.train.max()) == 255


def test_pixels_survive_the_way_to_the_models_range_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_unit(pixels)), pixels)
    assert to_unit(pixels).min() == -1
    assert to_unit(pixels).max() == 1
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def test_digest_tells_data_apart() -> None:
    digits = load_data("digits")
    changed = digits.train.clone()
    changed[0, 0, 0, 0] ^= 1
    other = ImageData("digits", changed, digits.held_out, digits.train_labels, digits.held_out_labels)
    assert digits.digest() == load_data("digits").digest()
    assert digits.digest() != other.digest()


def test_digest_covers_the_shape_the_labels_and_the_split_and_not_the_name() -> None:
    images, labels = torch.arange(4 * 16, dtype=torch.uint8).reshape(4, 1, 4, 4), torch.arange(4)

    def digest(order: list[int], *, shape: tuple[int, int] = (4, 4), name: str = "a", labelled: bool = True) -> str:
        pixels = images[order].reshape(4, 1, *shape)
        of = (labels[order][:3], labels[order][3:]) if labelled else (None, None)
        return ImageData(name, pixels[:3], pixels[3:], *of).digest()

    base = digest([0, 1, 2, 3])
    assert digest([0, 1, 2, 3], name="b") == base
    others = [
        digest([0, 1, 3, 2]),  # an image held out instead of another
        digest([1, 0, 2, 3]),  # batches would hold other images
        digest([0, 1, 2, 3], shape=(2, 8)),
        digest([0, 1, 2, 3], labelled=False),
    ]
    assert len({base, *others}) == 5
    assert re.fullmatch("[0-9a-f]{64}", base)


# ---- IDX ---------------------------------------------------------------------------------------------------------


def write_idx(path: Path, array: np.ndarray) -> None:
    raw = struct.pack(f">{1 + array.ndim}i", 0x0800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for stem, n, suffix in (("train", 30, ".gz"), ("t10k", 10, "")):
        write_idx(tmp_path / f"{stem}-images-idx3-ubyte{suffix}", rng.integers(0, 256, (n, 5, 4)))
        write_idx(tmp_path / f"{stem}-labels-idx1-ubyte{suffix}", rng.integers(0, 3, n))
    return tmp_path


def test_idx_files_plain_and_gzipped(idx_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 5, 4))
    loaded = load_data(str(idx_folder))
    assert loaded.train.shape == (30, 1, 5, 4)
    assert np.array_equal(loaded.train[:, 0].numpy(), images)
    assert np.array_equal(loaded.train_labels, rng.integers(0, 3, 30))  # type: ignore[arg-type]
    assert loaded.held_out.shape == (10, 1, 5, 4)
    monkeypatch.setattr(sources, "FASHION_MNIST", idx_folder)
    assert load_data("fashion-mnist").digest() == loaded.digest()


def test_broken_idx_folders_are_refused_by_name(idx_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = idx_folder / "t10k-labels-idx1-ubyte"
    whole = labels.read_bytes()
    labels.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte must be an IDX file .* truncated"):
        load_data(str(idx_folder))
    labels.write_bytes(b"")
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte must be an IDX file"):
        load_data(str(idx_folder))
    write_idx(labels, np.zeros(9))
    with pytest.raises(ValueError, match="as many labels as images; got 9 and 10"):
        load_data(str(idx_folder))
    zipped = idx_folder / "train-images-idx3-ubyte.gz"
    zipped.write_bytes(zipped.read_bytes()[:50])
    with pytest.raises(ValueError, match="must be a complete gzip file"):
        load_data(str(idx_folder))
    zipped.unlink()
    with pytest.raises(ValueError, match="missing: train-images-idx3-ubyte"):
        load_data(str(idx_folder))
    monkeypatch.setattr(sources, "FASHION_MNIST", idx_folder / "nowhere")
    with pytest.raises(ValueError, match="Install Debian's package dataset-fashion-mnist"):
        load_data("fashion-mnist")


MAGIC_3, MAGIC_1 = struct.pack(">i", 0x803), struct.pack(">i", 0x801)
IMAGES, LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, b"", "truncated, since its 0 bytes do not hold a header"),
        (IMAGES, MAGIC_3 + bytes(8), "truncated, since its 12 bytes do not hold a header"),
        (IMAGES, b"PK\3\4" + bytes(500), "begins with 0x504b0304, which is no IDX header"),
        (IMAGES, struct.pack(">iiii", 0xD03, 10, 5, 4) + bytes(800), "its numbers have the type 0x0d, not 0x08"),
        (IMAGES, struct.pack(">ii", 0x801, 10) + bytes(10), "3 dimensions; it has 1 dimensions"),
        (LABELS, struct.pack(">iiii", 0x803, 10, 5, 4) + bytes(200), "1 dimension; it has 3 dimensions"),
        (IMAGES, MAGIC_3 + struct.pack(">iii", 10, 5, 4) + bytes(199), "truncated after 199 of them"),
        (IMAGES, MAGIC_3 + struct.pack(">iii", 10, 5, 4) + bytes(201), "promises 200 bytes, and it has more"),
        (LABELS, MAGIC_1 + struct.pack(">i", 10) + bytes(11), "promises 10 bytes, and it has more"),
        (IMAGES, MAGIC_3 + struct.pack(">iii", -1, -5, 4) + bytes(20), "its header says -1 x -5 x 4"),
        (IMAGES, MAGIC_3 + struct.pack(">iii", *[2**31 - 1] * 3) + bytes(200), "truncated after 200 of them"),
        (IMAGES, MAGIC_3 + struct.pack(">iii", 2**30, 2**30, 16) + bytes(200), "truncated after 200 of them"),
        (IMAGES, MAGIC_3 + struct.pack(">iii", 0, 5, 4), "as many labels as images; got 10 and 0"),
        (
            IMAGES,
            MAGIC_3 + struct.pack(">iii", 10, 0, 4),
            "of at least one pixel; it holds 10 of 0x4 pixels",
        ),
        (IMAGES, MAGIC_3 + struct.pack(">iii", 10, 4, 5) + bytes(200), "one size; got 5x4 and 4x5 pixels"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_a_damaged_idx_file_is_refused_by_name(
    idx_folder: Path, name: str, content: bytes, message: str, zipped: bool
) -> None:
    (idx_folder / name).unlink()
    path = idx_folder / (f"{name}.gz" if zipped else name)
    path.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        load_data(str(idx_folder))
    assert str(raised.value).startswith(str(idx_folder))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("part", ["train", "t10k"])
def test_idx_files_with_too_few_images_are_refused(idx_folder: Path, part: str, n: int) -> None:
    for kind, shape in (("images-idx3", (n, 5, 4)), ("labels-idx1", (n,))):
        for suffix in ("", ".gz"):
            (idx_folder / f"{part}-{kind}-ubyte{suffix}").unlink(missing_ok=True)
        write_idx(idx_folder / f"{part}-{kind}-ubyte", np.zeros(shape))
    with pytest.raises(ValueError, match=f"{part}-images-idx3-ubyte must hold at least 2 .* it holds {n} of 5x4"):
        load_data(str(idx_folder))


def test_every_damage_of_a_gzip_file_is_refused_by_name(idx_folder: Path) -> None:
    path = idx_folder / "train-images-idx3-ubyte.gz"
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    before = load_data(str(idx_folder)).digest()
    messages = []
    cuts = [whole[:n] for n in (0, 1, 5, 12, len(whole) // 2, len(whole) - 8, len(whole) - 1)]
    damaged = []
    for _ in range(60):
        changed = np.frombuffer(whole, np.uint8).copy()
        changed[rng.integers(0, len(whole))] ^= rng.integers(1, 256)
        damaged.append(changed.tobytes())
    for content in (*cuts, *damaged, whole + b"more"):
        path.write_bytes(content)
        try:
            loaded = load_data(str(idx_folder))
        except ValueError as error:
            messages.append(str(error))
        else:  # the time or the name of the file in the header of gzip
            assert loaded.digest() == before
    assert len(messages) > len(cuts)
    assert all(message.startswith(str(path)) and "\n" not in message for message in messages)


def test_batches_of_no_images_are_refused() -> None:
    with pytest.raises(ValueError, match="images must hold at least one image"):
        Batches(torch.zeros(0, 1, 8, 8, dtype=torch.uint8), 4, torch.Generator())


# ---- folders of images -------------------------------------------------------------------------------------------


def save_images(folder: Path, n: int, *, mode: str = "RGB", size: tuple[int, int] = (12, 9)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode=mode if mode == "L" else None).save(
            folder / f"{i}.png"
        )


def test_folder_of_images(tmp_path: Path) -> None:
    save_images(tmp_path / "colour", 40)
    loaded = load_data(str(tmp_path / "colour"), image_size=8)
    assert loaded.name == "colour"
    assert loaded.shape == (3, 8, 8)
    assert (len(loaded.train), len(loaded.held_out)) == (36, 4)
    assert loaded.train_labels is None
    save_images(tmp_path / "grey" / "a", 15, mode="L", size=(8, 8))
    save_images(tmp_path / "grey" / "b" / "deeper", 15, mode="L", size=(8, 8))
    grey = load_data(str(tmp_path / "grey"), image_size=8)
    assert grey.shape == (1, 8, 8)
    assert grey.train_labels is not None
    assert grey.train_labels.unique().tolist() == [0, 1]
    with Image.open(tmp_path / "grey" / "a" / "0.png") as image:  # an image that already has the size is not changed
        assert any(
            np.array_equal(np.asarray(image), pixels[0]) for pixels in torch.cat([grey.train, grey.held_out]).numpy()
        )


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"digits, mnist, fashion-mnist or a folder; the folder 'digit' does not exist"
    ):
        load_data("digit")
    with pytest.raises(ValueError, match=r"must hold at least 20 images .*; found 0"):
        load_data(str(tmp_path))
    save_images(tmp_path, 25)
    with pytest.raises(ValueError, match="is a file"):
        load_data(str(tmp_path / "0.png"))
    (tmp_path / "7.png").write_bytes((tmp_path / "7.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"7\.png must be an image; it cannot be read"):
        load_data(str(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0)
    try:
        with pytest.raises(PermissionError):
            load_data(str(tmp_path))
    finally:
        tmp_path.chmod(0o700)


def found(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in find_images(folder))


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_only_visible_image_files_count(tmp_path: Path) -> None:
    touch(tmp_path / "a.png", tmp_path / "b" / "c.JPG", tmp_path / "b" / "d e.tiff")
    touch(
        tmp_path / ".hidden.png", tmp_path / "b" / "._a.png", tmp_path / ".thumbnails" / "a.png", tmp_path / "note.txt"
    )
    touch(tmp_path / "frames.gif" / "inside.png", tmp_path / "__MACOSX" / "._a.png")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for a writer
    assert found(tmp_path) == ["a.png", "b/c.JPG", "b/d e.tiff"]


def test_a_hidden_folder_may_be_the_dataset(tmp_path: Path) -> None:
    touch(tmp_path / ".cache" / "a.png")
    assert found(tmp_path / ".cache") == ["a.png"]


def test_symbolic_links_are_followed_once(tmp_path: Path) -> None:
    data, outside = tmp_path / "data", tmp_path / "outside"
    touch(data / "real" / "a.png", outside / "pool" / "b.png", outside / "c.png", outside / "deep" / "d.png")
    (data / "again.png").symlink_to(data / "real" / "a.png")  # a file that is there already
    (data / "0again").symlink_to(data / "real")  # a folder that is there already
    (data / "loop").symlink_to(data)
    (data / "real" / "up").symlink_to("..")
    (data / "above").symlink_to(tmp_path)  # holds the dataset
    (data / "b.png").symlink_to(outside / "pool" / "b.png")
    (data / "pool").symlink_to(outside / "pool")  # holds only what is linked already
    (data / "deep").symlink_to(outside / "deep")
    (outside / "deep" / "back").symlink_to(outside / "deep")
    (data / "c1.png").symlink_to(outside / "c.png")
    (data / "c2.png").symlink_to("c1.png")
    (data / "frames.png").symlink_to(outside / "deep")
    (data / "nowhere").symlink_to(outside / "missing")  # not named like an image
    (data / ".hidden.png").symlink_to(outside / "missing")
    assert found(data) == ["b.png", "c1.png", "deep/d.png", "real/a.png"]
    (tmp_path / "link").symlink_to(data)
    assert found(tmp_path / "link") == found(data)


@pytest.mark.parametrize("target", ["missing.png", "a.png"])  # no file, and itself
def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, target: str) -> None:
    save_images(tmp_path, 25)
    (tmp_path / "a.png").symlink_to(target)
    with pytest.raises(ValueError, match=r"a\.png must lead to an image; it is a symbolic link to a file that does"):
        load_data(str(tmp_path), image_size=8)


def test_results_of_antdiff_are_no_data(tmp_path: Path) -> None:
    touch(tmp_path / "a.png")
    run = tmp_path / "runs" / "old"
    touch(run / "config.json", run / "checkpoints" / "step", run / "samples" / "step-1.png", run / "samples.png")
    started = tmp_path / "runs" / "started"  # no checkpoint yet
    touch(started / "config.json", started / "clusters.json", started / "samples" / "step-1.png")
    comparison = tmp_path / "comparison"
    touch(comparison / "comparison.png")
    with locked(comparison, "comparison"):
        pass
    touch(tmp_path / "configured" / "config.json", tmp_path / "configured" / "b.png")  # no run
    assert found(tmp_path) == ["a.png", "configured/b.png"]
    assert found(run / "samples") == ["step-1.png"]  # named by the user
    touch(run / "photo.png", run / "holiday" / "b.png", run / "samples-100.png", run / "curves.png")
    assert found(run) == ["holiday/b.png", "photo.png"]  # a run that was made in the folder of its data


def test_the_folder_of_a_dataset_name_is_a_conflict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mnist = load_data("mnist").digest()
    (tmp_path / "mnist" / "empty").mkdir(parents=True)
    touch(tmp_path / "mnist" / "note.txt")
    assert load_data("mnist").digest() == mnist  # no images, no conflict
    save_images(tmp_path / "mnist", 25)
    with pytest.raises(ValueError, match=r"data must mean one dataset; 'mnist' is .* Pass \./mnist for the folder"):
        load_data("mnist")
    loaded = load_data("./mnist", image_size=8)
    assert (loaded.name, loaded.shape) == ("mnist", (3, 8, 8))


def test_the_empty_string_names_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_images(tmp_path, 25)
    with pytest.raises(ValueError, match=r"got an empty string\. Pass --data \. for the current folder"):
        load_data("", image_size=8)
    assert load_data(".", image_size=8).name == tmp_path.name


def test_images_that_do_not_fit_into_memory_are_refused(tmp_path: Path) -> None:
    save_images(tmp_path, 25)
    for size in (2**24, 2**40):
        with pytest.raises(ValueError, match=f"must fit into memory; its 25 images of {size}x{size} pixels take"):
            load_data(str(tmp_path), image_size=size)
    with pytest.raises(ValueError, match="image_size must be at least 1; got 0"):
        load_data(str(tmp_path), image_size=0)


def test_one_deep_image_among_colours_keeps_its_brightness(tmp_path: Path) -> None:
    save_images(tmp_path, 24, size=(8, 8))
    Image.fromarray(np.full((8, 8), 51 * 257, np.uint16)).save(tmp_path / "deep.tif")
    images = load_data(str(tmp_path), image_size=8)
    together = torch.cat([images.train, images.held_out])
    assert together.shape == (25, 3, 8, 8)
    assert int((together == 51).all(dim=(1, 2, 3)).sum()) == 1
