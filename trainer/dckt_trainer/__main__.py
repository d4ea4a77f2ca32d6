"""`python -m dckt_trainer` is `dckt-train`."""

from dckt_trainer.cli import main

if __name__ == "__main__":
    main()
