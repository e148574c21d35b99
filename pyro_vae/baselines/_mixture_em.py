"""The two steps of EM for Gaussian mixtures, and their start.

Covariances are ``(K, D, D)`` when full, and otherwise their diagonals, ``(K, D)``.
"""

import math

import torch
from torch import Tensor

from pyro_vae.baselines._mixture_checks import CollapsedComponentError, check_components

__all__ = [
    "component_log_probs",
    "floor_variances",
    "kmeans_labels",
    "m_step",
    "mixture_start",
    "moments",
]

_EPS = torch.finfo(torch.float64).eps


def component_log_probs(x: Tensor, locs: Tensor, covariances: Tensor) -> Tensor:
    """Compute the log-density of each row under each component.

    Args:
        x: Shape ``(N, D)``.
        locs: Shape ``(K, D)``.
        covariances: Shape ``(K, D, D)``, or ``(K, D)`` for diagonals.

    Returns:
        Shape ``(N, K)``, nats.

    Example:
        >>> x = torch.zeros(1, 2)
        >>> component_log_probs(x, torch.zeros(1, 2), torch.ones(1, 2))
        tensor([[-1.8379]])
    """
    columns = []
    for loc, covariance in zip(locs, covariances, strict=True):
        centred = x - loc
        if covariance.ndim == 1:
            quadratic = (centred.square() / covariance).sum(-1)
            log_det = covariance.log().sum()
        else:
            scale_tril = torch.linalg.cholesky(covariance)
            white = torch.linalg.solve_triangular(scale_tril, centred.mT, upper=False)
            quadratic = white.square().sum(0)
            log_det = 2 * scale_tril.diagonal().log().sum()
        columns.append(-0.5 * (quadratic + log_det + x.shape[1] * math.log(2 * math.pi)))
    return torch.stack(columns, -1)


def moments(
    data: Tensor, responsibilities: Tensor, covariance: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Average the data per component: the M step without constraints.

    Args:
        data: Shape ``(N, D)``.
        responsibilities: Shape ``(N, K)``, rows that sum to one.
        covariance: ``"full"``, ``"diagonal"`` or ``"spherical"``.

    Returns:
        Weights ``(K,)``, locs ``(K, D)`` and covariances ``(K, D, D)`` or ``(K, D)``.

    Raises:
        CollapsedComponentError: If a component explains no row.
    """
    counts = responsibilities.sum(0)
    for component, count in enumerate(counts.tolist()):
        if count <= data.shape[0] * _EPS:
            raise CollapsedComponentError(component, count, 0)
    locs = (responsibilities.mT @ data) / counts.unsqueeze(-1)
    covariances = []
    for loc, column, count in zip(locs, responsibilities.mT, counts, strict=True):
        centred = data - loc
        weighted = centred * (column / count).unsqueeze(-1)
        if covariance == "full":
            square = weighted.mT @ centred
            covariances.append((square + square.mT) / 2)
            continue
        variances = (weighted * centred).sum(0)
        covariances.append(
            variances if covariance == "diagonal" else variances.mean().expand(loc.shape)
        )
    return counts / counts.sum(), locs, torch.stack(covariances)


def floor_variances(covariances: Tensor, min_variance: float) -> Tensor:
    """Raise every eigenvalue below ``min_variance`` to it.

    This is the exact maximum likelihood under the constraint, so that EM still never decreases:
    the expected log-likelihood ``-log|C| - tr(S / C)`` is largest for a C that shares the
    eigenvectors of S, and in each eigenvalue it rises up to that of S and falls beyond.

    Args:
        covariances: Shape ``(K, D, D)``, or ``(K, D)`` for diagonals.
        min_variance: Smallest eigenvalue allowed.

    Returns:
        Same shape.

    Example:
        >>> floor_variances(torch.tensor([[4.0, 0.0]]), 0.5)
        tensor([[4.0000, 0.5000]])
    """
    if covariances.ndim == 2:
        return covariances.clamp(min=min_variance)
    if min_variance == 0.0:
        return covariances
    eigenvalues, vectors = torch.linalg.eigh(covariances)
    floored = (vectors * eigenvalues.clamp(min=min_variance).unsqueeze(-2)) @ vectors.mT
    untouched = (eigenvalues >= min_variance).all(-1)
    return torch.where(untouched[:, None, None], covariances, (floored + floored.mT) / 2)


def kmeans_labels(data: Tensor, num_components: int) -> Tensor:
    """Cluster the rows by k-means++ and k-means.

    Its seed is drawn from torch's global generator; numpy's is left alone.

    Args:
        data: Float64, shape ``(N, D)``.
        num_components: Number of clusters K.

    Returns:
        Labels of shape ``(N,)``, from 0 to K - 1.

    Example:
        >>> labels = kmeans_labels(torch.tensor([[0.0], [0.1], [9.0]]).double(), 2)
        >>> labels[0] == labels[1], labels[0] == labels[2]
        (tensor(True), tensor(False))
    """
    from sklearn.cluster import KMeans

    seed = int(torch.randint(2**31 - 1, ()))
    kmeans = KMeans(num_components, init="k-means++", n_init=1, random_state=seed)
    labels = torch.as_tensor(kmeans.fit_predict(data.cpu().numpy()))
    return labels.to(data.device, torch.int64)


def m_step(
    data: Tensor, responsibilities: Tensor, covariance: str, min_variance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Maximise the expected log-likelihood under the constraints.

    Args:
        data: Shape ``(N, D)``.
        responsibilities: Shape ``(N, K)``, rows that sum to one.
        covariance: ``"full"``, ``"diagonal"`` or ``"spherical"``.
        min_variance: Smallest eigenvalue allowed.

    Returns:
        Weights ``(K,)``, locs ``(K, D)`` and covariances ``(K, D, D)`` or ``(K, D)``.

    Raises:
        CollapsedComponentError: If a component explains no row or has a singular covariance.
    """
    weights, locs, covariances = moments(data, responsibilities, covariance)
    covariances = floor_variances(covariances, min_variance)
    check_components(data, weights, covariances)
    return weights, locs, covariances


def mixture_start(
    data: Tensor, num_components: int, covariance: str, min_variance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Start from the clusters of k-means, all with their pooled covariance.

    Pooling keeps a small cluster from starting with a singular covariance.

    Args:
        data: Shape ``(N, D)``.
        num_components: Number of components K.
        covariance: ``"full"``, ``"diagonal"`` or ``"spherical"``.
        min_variance: Smallest eigenvalue allowed.

    Returns:
        Weights ``(K,)``, locs ``(K, D)`` and covariances ``(K, D, D)`` or ``(K, D)``.

    Raises:
        CollapsedComponentError: If the pooled covariance is singular.
    """
    labels = kmeans_labels(data, num_components)
    one_hot = torch.nn.functional.one_hot(labels, num_components).to(data.dtype)
    weights, locs, covariances = moments(data, one_hot, covariance)
    pooled = floor_variances(torch.tensordot(weights, covariances, 1).unsqueeze(0), min_variance)
    check_components(data, weights, pooled)
    return weights, locs, pooled.expand_as(covariances)
