"""The mixer as a Hugging Face Space: open to everyone, within limits that two CPU cores bear."""

import torch

from demos.mixer.app import serve

MAX_CHAINS = 16


def main() -> None:
    # A Space forwards this port of its container, and stands between it and the world.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    serve(host="0.0.0.0", port=7860, max_chains=MAX_CHAINS, device=device)


if __name__ == "__main__":
    main()
