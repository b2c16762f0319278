import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from ldm.data.shapes import render
from ldm.evaluation import clip_score, inception, quality, scene_features
from ldm.evaluation.distances import Statistics, frechet_distance
from ldm.evaluation.quality import FeatureNet, Reference, captions_of, distances, mean_clip_score, reader_accuracy
from ldm.modules.pictures import to_uint8
from ldm.util import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny() -> FeatureNet:
    return FeatureNet.pick("tiny", None, CPU)


@pytest.fixture(scope="module")
def true_features(tiny: FeatureNet) -> np.ndarray:
    return tiny.of_tiny_world(2000, seed=1)


def fid(tiny: FeatureNet, images: torch.Tensor, reference: np.ndarray) -> float:
    found = tiny.of_tensors(iter(images.split(250)))
    return frechet_distance(Statistics.of(found), Statistics.of(reference))


def test_the_shipped_net_reads_scenes(tiny: FeatureNet) -> None:
    images, scenes = scene_features.draw_scenes(300, seed=7)
    with torch.no_grad():
        answers = tiny.net.answer(images)
    for name in scene_features.ANSWERS:
        right = [answer[name] == getattr(scene, name) for answer, scene in zip(answers, scenes, strict=True)]
        assert np.mean(right) > 0.99, name


def test_fid_is_near_zero_for_two_samples_of_the_world(tiny: FeatureNet, true_features: np.ndarray) -> None:
    images, _ = scene_features.draw_scenes(1000, seed=2)
    found = tiny.of_tensors(iter(images.split(250)))
    same = distances(found, Reference(Statistics.of(true_features), true_features), tiny.name)
    assert same["FID (tiny features)"] < 0.012 * np.trace(Statistics.of(true_features).covariance)
    assert abs(same["KID (tiny features)"]) < 2 * same["KID (tiny features), deviation over subsets"]


def noised(images: torch.Tensor, amount: float) -> torch.Tensor:
    return images + 0.3 * amount * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))


def blurred(images: torch.Tensor, amount: float) -> torch.Tensor:
    pictures = [Image.fromarray(array).filter(ImageFilter.GaussianBlur(3 * amount)) for array in to_uint8(images)]
    return torch.from_numpy(np.stack([np.array(p) for p in pictures])).permute(0, 3, 1, 2).float() / 127.5 - 1


def swapped(images: torch.Tensor, amount: float) -> torch.Tensor:
    """Some pictures are copies of a few others, as of a model that draws always the same."""
    images = images.clone()
    count = int(amount * len(images))
    images[:count] = images[-5:].repeat(-(-count // 5), 1, 1, 1)[:count]
    return images


def covered(images: torch.Tensor, amount: float) -> torch.Tensor:
    images = images.clone()
    images[:, :, 32 - int(24 * amount) : 32 + int(24 * amount), 20:44] = 0.5
    return images


@pytest.mark.parametrize("spoil", [noised, blurred, swapped, covered])
def test_fid_grows_with_what_is_wrong(spoil, tiny: FeatureNet, true_features: np.ndarray) -> None:
    images, _ = scene_features.draw_scenes(500, seed=3)
    curve = [fid(tiny, spoil(images, amount), true_features) for amount in (0.0, 0.2, 0.5, 1.0)]
    assert curve == sorted(curve) and curve[2] > 1.3 * curve[0] and curve[3] > 2 * curve[0], curve


def test_training_learns() -> None:
    net = scene_features.train(25, 32, 3e-3, 0)
    images, scenes = scene_features.draw_scenes(200, seed=8)
    with torch.no_grad():
        answers = net.answer(images)
    assert np.mean([a["background"] == s.background for a, s in zip(answers, scenes, strict=True)]) > 0.6


def write_scenes(folder: Path, count: int, seed: int) -> list:
    _, scenes = scene_features.draw_scenes(count, seed)
    for i, scene in enumerate(scenes):
        path = folder / f"{i // 10:05}" / f"{i:06}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        render(scene).save(path)
    return scenes


def test_folders_files_and_drawings_are_references(tiny: FeatureNet, tmp_path: Path) -> None:
    write_scenes(tmp_path / "a", 30, 0)
    write_scenes(tmp_path / "b", 30, 1)
    found = tiny.of_files(quality.pictures_in(tmp_path / "a"), 7)
    folder = Reference.read(str(tmp_path / "b"), tiny, 16)
    scores = distances(found, folder, tiny.name)
    assert set(scores) == {
        "FID (tiny features)",
        "KID (tiny features)",
        "KID (tiny features), deviation over subsets",
    }
    folder.statistics.save(tmp_path / "b.npz")
    by_file = distances(found, Reference.read(str(tmp_path / "b.npz"), tiny, 16), tiny.name)
    assert by_file == {"FID (tiny features)": pytest.approx(scores["FID (tiny features)"])}
    images = [Image.open(path) for path in quality.pictures_in(tmp_path / "a")]
    assert np.allclose(tiny.of_images(images, 4), found, atol=1e-5)


def test_statistics_of_another_net_are_refused(tiny: FeatureNet, tmp_path: Path) -> None:
    Statistics(np.zeros(2048), np.eye(2048)).save(tmp_path / "inception.npz")
    with pytest.raises(UserError, match="has 2048 features, but tiny features has 128"):
        Reference.read(str(tmp_path / "inception.npz"), tiny, 4)


def test_captions_come_from_a_manifest_or_from_files_beside(tmp_path: Path) -> None:
    scenes = write_scenes(tmp_path, 12, 0)
    paths = quality.pictures_in(tmp_path)
    assert captions_of(tmp_path, paths) is None
    for path, scene in zip(paths, scenes, strict=True):
        path.with_suffix(".txt").write_text(scene.caption)
    expected = [scene.caption for scene in scenes]
    assert captions_of(tmp_path, paths) == expected
    rows = [{"file": p.relative_to(tmp_path).as_posix(), "prompt": "a blue ring"} for p in paths]
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert captions_of(tmp_path, paths) == ["a blue ring"] * 12
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows[1:])))
    with pytest.raises(UserError, match="1 of 12 pictures have no caption, such as 000000.png"):
        captions_of(tmp_path, paths)
    assert reader_accuracy(paths, expected)["prompt accuracy, everything"] == 1.0
    assert reader_accuracy(paths, expected[1:] + expected[:1])["prompt accuracy, everything"] < 0.3
    assert reader_accuracy(paths, ["a photograph of a dog"] * 12) == {}


# ---- Inception and CLIP, of random weights ---------------------------------------------------------------------


def test_inception_pools_as_the_original_does() -> None:
    torch.manual_seed(0)
    net = inception.InceptionFeatures().eval()
    block = net.net.Mixed_5b
    x = torch.randn(1, 192, 5, 5)
    with torch.no_grad():
        found = block(x)[:, -32:]
        mean = torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        assert torch.allclose(found, torch.relu(block.branch_pool.bn(block.branch_pool.conv(mean))), atol=1e-5)
        x = torch.randn(1, 2048, 3, 3)
        block = net.net.Mixed_7c
        greatest = torch.nn.functional.max_pool2d(x, 3, 1, 1)
        expected = torch.relu(block.branch_pool.bn(block.branch_pool.conv(greatest)))
        assert torch.allclose(block(x)[:, -192:], expected, atol=1e-5)
        assert net(torch.randn(2, 3, 75, 75)).shape == (2, 2048)


def test_inception_reads_a_file_of_weights(tmp_path: Path) -> None:
    from torchvision.models.inception import Inception3

    state = Inception3(num_classes=1008, aux_logits=False, init_weights=False).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    net = inception.load(str(tmp_path / "weights.pth"))
    assert torch.equal(net.net.Mixed_7c.branch1x1.conv.weight, state["Mixed_7c.branch1x1.conv.weight"])
    del state["Mixed_5b.branch1x1.conv.weight"]
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="lacks 1 weights"):
        inception.load(str(tmp_path / "weights.pth"))


def clip_folder(path: Path) -> Path:
    """A random CLIP of a few thousand numbers, in transformers' form."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    words = ["a", "red", "blue", "ring", "star"]
    vocabulary = {
        token: i for i, token in enumerate([*(w + "</w>" for w in words), "<|startoftext|>", "<|endoftext|>"])
    }
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    (path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(path / "vocab.json"), str(path / "merges.txt"))
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = CLIPConfig(
        text_config={**size, "vocab_size": len(vocabulary), "eos_token_id": 6, "bos_token_id": 5},
        vision_config={**size, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(path)
    shape = {"height": 32, "width": 32}
    CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=shape), tokenizer).save_pretrained(path)
    return path


def test_clip_score_is_the_scaled_cosine(tmp_path: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    (tmp_path / "clip").mkdir()
    folder = clip_folder(tmp_path / "clip")
    scenes = write_scenes(tmp_path / "pictures", 5, 0)
    paths = quality.pictures_in(tmp_path / "pictures")
    captions = [f"a {scene.colour} {scene.shape}" for scene in scenes]
    found = mean_clip_score(clip_score.load(str(folder), CPU), paths, captions, 2)
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    scores = []
    for path, caption in zip(paths, captions, strict=True):
        inputs = processor(text=[caption], images=[Image.open(path)], return_tensors="pt")
        with torch.no_grad():  # logits are the cosine times a learned scale
            scores.append(float(model(**inputs).logits_per_image / model.logit_scale.exp()))
    assert found == pytest.approx(100 * np.mean(np.clip(scores, 0, None)), abs=1e-3)


def test_a_missing_clip_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--clip: ") as error:
        clip_score.load(str(tmp_path), CPU)
    assert "\n" not in str(error.value)
