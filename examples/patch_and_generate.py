"""Run a Hugging Face model with the integer inverse inside."""

from __future__ import annotations

import qinvert
from qinvert import recall


def main() -> None:
    """Calibrate the embedded model, patch it, and compare what it recalls."""
    model = recall.load_model()
    plan = qinvert.calibrate(model, data=recall.sequences(8, seed=0))
    tokens = recall.sequences(8, seed=1)

    exact = recall.accuracy(model(tokens).logits, tokens)
    with qinvert.patched(model, plan):
        integer = recall.accuracy(model(tokens).logits, tokens)
        continued = model.generate(tokens[:1, :255], max_new_tokens=1, do_sample=False)
    print(f"accuracy: exact {exact:.4f}, integer {integer:.4f}")
    print(f"next token with the integer inverse: {int(continued[0, -1])}, true: {int(tokens[0, 255])}")
    print(qinvert.evaluate(model, plan, tokens, score=recall.accuracy))


if __name__ == "__main__":
    main()
