"""Full attention: every query reads every key. MHA, GQA or MQA as the model has it."""

from torch import Tensor

from nsa_platform.evaluate.baselines.policy import Piece, Policy


class Full(Policy):
    """The reference of all policies, through the same code."""

    sparse_in = ()

    def allowed(self, piece: Piece, scores: Tensor) -> Tensor:
        return piece.distance >= 0
