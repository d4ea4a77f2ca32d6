"""dckt_trainer: two-level progressive cross-media transfer (DCKT) in PyTorch.

The parts, in the order in which a run meets them: ``config`` (what to do), ``data`` (corpora and cached features),
``words`` and ``word_cnn`` (the text input), ``network`` (one domain's network), ``losses`` and ``mmd`` (what is
minimised), ``pretrain``, ``selection`` and ``transfer`` (how), ``evaluate`` (how well), ``runs`` (where it is kept).
"""
