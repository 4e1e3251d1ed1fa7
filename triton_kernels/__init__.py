"""Statistics of stacked token states: tensors in, tensors out."""

from repflow.triton_kernels.cohesion import TokenSums, depth_and_token_sums, token_sums
from repflow.triton_kernels.depth import DepthStatistics, depth_statistics
from repflow.triton_kernels.hsic import HsicStatistics, hsic_statistics, pairwise_hsic
from repflow.triton_kernels.similarity_gradient import SimilarityGradient, similarity_gradient

__all__ = [
    "DepthStatistics",
    "HsicStatistics",
    "SimilarityGradient",
    "TokenSums",
    "depth_and_token_sums",
    "depth_statistics",
    "hsic_statistics",
    "pairwise_hsic",
    "similarity_gradient",
    "token_sums",
]
