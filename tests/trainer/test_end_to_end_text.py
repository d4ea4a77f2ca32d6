"""The Word CNN trained together with its network: it learns when it may, and the model that is saved has it."""

import pytest
import torch

from dckt_trainer import transfer
from dckt_trainer.checkpoint import load_tensors
from dckt_trainer.encoders import encode
from dckt_trainer.model import load_model
from dckt_trainer.runs import open_run
from dckt_trainer.train import resume
from dckt_trainer.transfer import transfer_round

END_TO_END = ("text.training=end_to_end", "text.cnn_frozen_rounds=2", "text.cnn_lr_factor=1.0")


def cnn_weights(run, domain, name="joint"):
    """The CNN's weights in a checkpoint of the joint stage, or after pretraining."""
    path = run.checkpoints / f"{name}.safetensors"
    prefix = f"{domain}.fronts.text." if name == "joint" else "fronts.text."
    return {k.removeprefix(prefix): v for k, v in load_tensors(path).items() if k.startswith(prefix)}


@pytest.fixture(scope="module")
def rounds(run_training, tmp_path_factory):
    """A run, and the CNN's weights of both domains after each round."""
    seen, real = {}, transfer_round

    def watched(number, source, target, *args, **kwargs):
        log = real(number, source, target, *args, **kwargs)
        seen[number] = {
            domain: {k: v.clone() for k, v in network.fronts["text"].state_dict().items()}
            for domain, network in (("source", source), ("target", target))
        }
        return log

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dckt_trainer.train.transfer_round", watched)
        run = run_training(tmp_path_factory.mktemp("runs") / "end-to-end", *END_TO_END)
    return run, seen


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_cnn_learns_in_pretraining_rests_for_two_rounds_and_learns_again(rounds):
    run, seen = rounds
    for domain in ("source", "target"):
        classifier = load_tensors(run.checkpoints / f"text-{domain}.safetensors")
        pretrained = cnn_weights(run, domain, f"{domain}-0")
        assert not equal(pretrained, classifier)
        assert torch.equal(pretrained["embedding.weight"], classifier["embedding.weight"])  # words never learn
        assert equal(seen[1][domain], pretrained)
        assert equal(seen[2][domain], pretrained)
        assert not equal(seen[3][domain], pretrained)
        assert equal(cnn_weights(run, domain), seen[3][domain])


def test_the_saved_model_reads_texts_with_the_cnn_of_the_kept_network(rounds):
    run, seen = rounds
    model = load_model(run.path / "target")
    assert equal(model.reader.state_dict(), seen[3]["target"])
    assert not model.network.fronts
    tokens = torch.tensor([[2, 3, 4, 0], [5, 2, 0, 0]])
    probability = encode(model.text_encoder(), tokens)["probability"]
    assert torch.allclose(probability.sum(1), torch.ones(2), atol=1e-5)


def test_stopped_and_gone_on_with_is_the_same(rounds, run_training, cache, tmp_path, monkeypatch):
    whole, _ = rounds
    real = transfer_round

    def stop(number, *args, **kwargs):
        if number == 3:
            raise KeyboardInterrupt
        return real(number, *args, **kwargs)

    monkeypatch.setattr("dckt_trainer.train.transfer_round", stop)
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "run", *END_TO_END)
    monkeypatch.setattr("dckt_trainer.train.transfer_round", transfer.transfer_round)
    resume(tmp_path / "run", cache=cache, device="cpu")
    one, other = (load_tensors(run.checkpoints / "joint.safetensors") for run in (whole, open_run(tmp_path / "run")))
    assert all(torch.equal(one[name], other[name]) for name in one | other)


def test_the_factor_of_the_learning_rate_takes_effect(rounds, run_training, tmp_path):
    run, _ = rounds
    still = run_training(tmp_path / "run", *END_TO_END, "text.cnn_lr_factor=0.0")
    for domain in ("source", "target"):
        classifier = load_tensors(still.checkpoints / f"text-{domain}.safetensors")
        assert equal(cnn_weights(still, domain), classifier)
        assert not equal(cnn_weights(run, domain), classifier)
