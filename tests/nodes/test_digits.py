"""A trained model: what INT8 leaves of what it has learned."""
from __future__ import annotations

import pytest
import torch
from toys import difference

from benchmarks import digits

pytestmark = pytest.mark.comfy
EACH = 10  # pictures of every digit
STEPS = 8


@pytest.fixture(scope="module")
def classifier():
    from sklearn.svm import SVC

    _, labels, pixels = digits.load_digits()
    return SVC().fit(pixels, labels)


@pytest.fixture
def model(comfy):
    return comfy.sd.load_diffusion_model(str(digits.ASSETS / digits.MODEL))


@pytest.fixture(scope="module")
def draw(comfy):
    """EACH pictures of every digit: -> model-space latents [10 * EACH, 16, 8, 8]."""
    context, pooled = digits.conds()

    def draw(model):
        result = []
        for digit in range(10):
            cond = [[context[digit:digit + 1], {"pooled_output": pooled[digit:digit + 1]}]]
            latent = torch.zeros(EACH, digits.CHANNELS, digits.SIZE, digits.SIZE)
            noise = comfy.sample.prepare_noise(latent, 100 + digit)
            samples = comfy.sample.sample(model, noise, STEPS, 1.0, "euler", "simple", cond, cond, latent, disable_pbar=True, seed=digit)
            result.append(model.model.process_latent_in(samples))
        return torch.cat(result)
    return draw


def recognised(classifier, latents) -> float:
    labels = torch.arange(10).repeat_interleave(EACH).numpy()
    return (classifier.predict(digits.to_pixels(latents).numpy()) == labels).mean().item()


def test_the_trained_model_draws_the_digit_that_it_is_asked_for(model, draw, classifier):
    rate = recognised(classifier, draw(model))
    print(f"recognised: {rate:.2f}")
    assert rate >= 0.9


@pytest.mark.rotating
@pytest.mark.parametrize("method", ["rowwise", "convrot", "smoothquant", "auto"])
def test_digits_are_recognised_as_often_in_int8(model, draw, classifier, nodes, method):
    eager = draw(model)
    quantized = draw(nodes.INT8QuantizeModel(model, method=method))
    print(f"{method}: recognised {recognised(classifier, quantized):.2f}, was {recognised(classifier, eager):.2f}, "
          f"difference {difference(quantized, eager):.4f}")
    assert difference(quantized, eager) < 0.05
    assert recognised(classifier, quantized) >= recognised(classifier, eager) - 0.01


def test_the_vae_that_is_written_down_shows_the_digits(comfy):
    latents, _, pixels = digits.load_digits()
    vae = comfy.sd.VAE(sd=digits.vae())
    image = vae.decode(latents[:3] / 0.3611 + 0.1159)
    assert image.shape == (3, 64, 64, 3)
    squares = image[..., 0].reshape(3, 8, 8, 8, 8).mean((2, 4)).reshape(3, 64) * 16
    assert (squares - torch.tensor(pixels[:3], dtype=torch.float32)).abs().max() < 1
