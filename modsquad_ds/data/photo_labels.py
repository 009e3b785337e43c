"""Taskonomy's targets computed from pixels and from metric depth, by the tasks' own definitions. Used by photo_scenes.py.

Taskonomy's annotators (Omnidata's code) render depth, normals, curvature and shading from a mesh; here a depth map stands for the
mesh. Everything else is computed as there, with the same constants, but for 3-D keypoints: NARF is a C++ program, so the
determinant of the Hessian of log depth stands in for it. The two class targets are answers of trained networks and are not made.

Camera frame: x to the right, y down, z away from the camera. Axes: H W rows and columns of pixels.
"""

import warnings
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from modsquad_ds.targets import DEPTH_HOLE, DEPTH_UNIT

Real = NDArray[np.float64]
Bytes = NDArray[np.uint8]
Words = NDArray[np.uint16]
Mask = NDArray[np.bool_]

MIN_RADIUS = 0.03
"""Metres: radius of the strongest curvature that the 8-bit image holds."""
MISSING_NORMAL = 128
"""All three channels of a pixel without normal."""
NORMAL_SIGMA = 2.0
"""Pixels: smoothing of the depth before normals are taken."""
CURVATURE_SIGMA = 4.0
"""The same before curvatures, which are second derivatives."""
TEXTURE_SIGMA = 3.0
KEYPOINT_SIGMAS = np.linspace(1, 30, 10)
KEYPOINT3D_SIGMAS = (4.0, 8.0, 16.0)
KEYPOINT3D_FULL = 0.006
"""Response, of depths in natural logarithms, that 65535 stands for."""


class Camera(NamedTuple):
    """A pinhole camera, in pixels, and the distance to its stereo partner."""

    focal: float
    cx: float
    cy: float
    baseline: float = 0.0
    """Metres."""
    doffs: float = 0.0
    """Disparity of a point at infinity is minus this."""

    def cut(self, left: int) -> "Camera":
        """The camera of an image without its first `left` columns."""
        return self._replace(cx=self.cx - left)

    def scaled(self, factor: float) -> "Camera":
        """The camera of an image resized by `factor`; pixel centres are at whole numbers."""
        cx, cy = ((c + 0.5) * factor - 0.5 for c in (self.cx, self.cy))
        return self._replace(focal=self.focal * factor, cx=cx, cy=cy)

    def rays(self, height: int, width: int) -> Real:
        """`[H, W, 3]`: the point at depth 1 that each pixel sees."""
        y, x = np.mgrid[:height, :width].astype(np.float64)
        return np.stack([(x - self.cx) / self.focal, (y - self.cy) / self.focal, np.ones_like(x)], axis=-1)


class Depth(NamedTuple):
    """What is known of the distance of an image's pixels."""

    metres: Real
    """`[H, W]` along the optical axis; 0 where it is not known."""
    valid: Mask
    camera: Camera

    @property
    def rays(self) -> Real:
        """`[H, W, 3]`, see `Camera.rays`."""
        height, width = self.metres.shape
        return self.camera.rays(height, width)


# ---------------------------------------------------------------- depth and what follows from it


def depth_from_disparity(disparity: NDArray[np.float32], camera: Camera) -> Depth:
    """Depth of an image from its disparity, f * B / (d + doffs); disparities that are not finite are holes."""
    valid = np.isfinite(disparity)
    metres = camera.focal * camera.baseline / (np.where(valid, disparity, 1.0).astype(np.float64) + camera.doffs)
    return Depth(np.where(valid, metres, 0.0), valid, camera)


def raw_depth(metres: Real, valid: Mask) -> Words:
    """1/512 m per step, 65535 where there is none."""
    return np.where(valid, np.clip(np.rint(metres / DEPTH_UNIT), 0, DEPTH_HOLE - 1), DEPTH_HOLE).astype(np.uint16)


def points(depth: Depth, sigma: float) -> Real:
    """`[H, W, 3]` in metres: the surface behind every pixel, smoothed; holes are bridged by what lies next to them."""
    return depth.rays * _smoothed(depth.metres, depth.valid, sigma)[..., None]


def normals(depth: Depth) -> Real:
    """Unit normals `[H, W, 3]`, camera frame, all towards the camera: their product with the viewing ray is negative."""
    surface = points(depth, NORMAL_SIGMA)
    return _facing(np.cross(_gradient(surface, 1), _gradient(surface, 0)), surface)


def curvatures(depth: Depth) -> Real:
    """Principal curvatures `[H, W, 2]` in 1/m, the larger first; positive where the surface bulges towards the camera.

    From the first and second fundamental form of the surface over the pixel grid.
    """
    surface = points(depth, CURVATURE_SIGMA)
    p_v, p_u = _gradient(surface, 0), _gradient(surface, 1)
    p_vv, p_uv, p_uu = _gradient(p_v, 0), _gradient(p_v, 1), _gradient(p_u, 1)
    normal = _facing(np.cross(p_u, p_v), surface)
    e, f, g = (_dot(a, b) for a, b in ((p_u, p_u), (p_u, p_v), (p_v, p_v)))
    # A bulge bends away from the side that its normal points to.
    el, em, en = (-_dot(second, normal) for second in (p_uu, p_uv, p_vv))
    area = e * g - f * f
    mean = (el * g - 2 * em * f + en * e) / (2 * area)
    gauss = (el * en - em * em) / area
    spread = np.sqrt(np.maximum(mean * mean - gauss, 0.0))
    return np.stack([mean + spread, mean - spread], axis=-1)


def shading(depth: Depth) -> Real:
    """`[H, W]` in [0, 1]: a matt surface lit by a point at the camera, the cosine between normal and direction to the light."""
    rays = depth.rays
    return np.clip(-_dot(normals(depth), rays) / np.sqrt(_dot(rays, rays)), 0.0, 1.0)


def occlusion_edges(raw: Words) -> Words:
    """Sobel magnitude `[H, W]` of sqrt(depth / 65536), 0 in and beside holes."""
    from skimage.filters import sobel
    from skimage.util import img_as_uint

    known = raw < DEPTH_HOLE - 499  # the annotator's margin for depths interpolated with holes
    return img_as_uint(np.clip(sobel(np.sqrt(raw / 65536.0), mask=known), 0.0, 1.0))


def keypoints3d(depth: Depth) -> Words:
    """`[H, W]`: a stand-in for NARF's interest: largest determinant of the Hessian of log depth over three scales."""
    from skimage.feature import hessian_matrix_det

    log = np.log(_filled(depth.metres, depth.valid))
    response = np.max([hessian_matrix_det(log, sigma) for sigma in KEYPOINT3D_SIGMAS], axis=0)
    return np.rint(np.clip(response / KEYPOINT3D_FULL, 0.0, 1.0) * 65535).astype(np.uint16)


def segments25d(depth: Depth) -> Bytes:
    """Ids `[H, W]`: log depth / 16 twice, normals, occlusion edges times 10 -> Felzenszwalb -> normalised cut."""
    raw = raw_depth(depth.metres, depth.valid)
    log = np.log(_filled(raw.astype(np.float64), depth.valid)) / 16
    edges = occlusion_edges(raw) / 65535.0
    features = np.concatenate([np.stack([log, log], -1), normals(depth), 10 * edges[..., None]], axis=-1)
    return _segments(features, sigma=0.0, min_size=200, threshold=1.0, cuts=100, max_edge=1.0)


# ---------------------------------------------------------------- from pixels alone


def texture_edges(rgb: Bytes) -> Words:
    """Sobel magnitude `[H, W]` of the smoothed grey image: Canny before its thinning."""
    from skimage.filters import gaussian, sobel
    from skimage.util import img_as_uint

    return img_as_uint(np.clip(sobel(gaussian(_grey(rgb), TEXTURE_SIGMA)), 0.0, 1.0))


def keypoints2d(rgb: Bytes) -> Words:
    """`[H, W]`: largest approximated determinant of the Hessian over ten scales: SURF before its choice of maxima."""
    from skimage.feature import hessian_matrix_det
    from skimage.util import img_as_uint

    grey = _grey(rgb)
    # Box filters leave small negative responses.
    return img_as_uint(np.clip(np.max([hessian_matrix_det(grey, sigma) for sigma in KEYPOINT_SIGMAS], axis=0), 0.0, 1.0))


def segments2d(rgb: Bytes) -> Bytes:
    """Ids `[H, W]`: Felzenszwalb's segments, joined by a normalised cut of their colours."""
    return _segments(rgb, sigma=3.0, min_size=20, threshold=0.005, cuts=10, max_edge=2.0)


# ---------------------------------------------------------------- as images


def normal_image(normal: Real, valid: Mask) -> Bytes:
    """127.5 * (1 + n) `[H, W, 3]`: red to the right, green down, blue towards the viewer, which is minus z."""
    towards_viewer = normal * (1.0, 1.0, -1.0)
    return np.where(valid[..., None], np.rint(127.5 * (1 + towards_viewer)), MISSING_NORMAL).astype(np.uint8)


def curvature_image(curvature: Real, valid: Mask) -> Bytes:
    """`[H, W, 3]`: the larger curvature in red, the smaller in green, 127 for none, 0 where depth is missing."""
    scaled = np.rint((np.clip(curvature * MIN_RADIUS, -1.0, 1.0) + 1) / 2 * 254)
    image = np.concatenate([scaled, np.zeros_like(scaled[..., :1])], axis=-1)
    return np.where(valid[..., None], image, 0).astype(np.uint8)


def grey_image(value: Real, valid: Mask) -> Bytes:
    """A value in [0, 1] as three equal channels `[H, W, 3]`, 0 where depth is missing."""
    return np.repeat(np.where(valid, np.rint(value * 255), 0).astype(np.uint8)[..., None], 3, axis=-1)


# ---------------------------------------------------------------- pieces


def _filled(value: Real, valid: Mask) -> Real:
    """Holes take the nearest known value."""
    nearest = ndimage.distance_transform_edt(~valid, return_distances=False, return_indices=True)
    return value[tuple(nearest)]


def _smoothed(value: Real, valid: Mask, sigma: float) -> Real:
    """Gaussian mean of the known values; far inside holes, of the nearest ones."""
    weight = np.where(valid, 1.0, 1e-6)
    return ndimage.gaussian_filter(_filled(value, valid) * weight, sigma) / ndimage.gaussian_filter(weight, sigma)


def _dot(a: Real, b: Real) -> Real:
    product: Real = np.sum(a * b, axis=-1)
    return product


def _gradient(values: Real, axis: int) -> Real:
    """Change per pixel along rows (axis 0: downwards) or columns (axis 1: to the right)."""
    change: Real = np.gradient(values, axis=axis)
    return change


def _facing(normal: Real, surface: Real) -> Real:
    """Normals of length 1, turned to the camera at the origin."""
    unit = normal / np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-12)
    return np.where(_dot(unit, surface)[..., None] > 0, -unit, unit)


def _grey(rgb: Bytes) -> Real:
    from skimage.color import rgb2gray

    return rgb2gray(rgb)


def _segments(features: NDArray[np.generic], sigma: float, min_size: int, threshold: float, cuts: int, max_edge: float) -> Bytes:
    """Felzenszwalb's segments (scale 200) joined by a normalised cut on the similarity of their mean features; ids from 0."""
    from skimage import graph, segmentation

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Got image with third dimension")  # channels, and meant
        fine = segmentation.felzenszwalb(features, scale=200, sigma=sigma, min_size=min_size, channel_axis=-1)
    joined = graph.cut_normalized(fine, _similarities(features, fine), threshold, cuts, in_place=False, max_edge=max_edge, rng=0)
    ids = np.unique(joined, return_inverse=True)[1].reshape(joined.shape)
    if ids.max() > 255:
        raise ValueError(f"{ids.max() + 1} segments do not fit 8 bits")
    return ids.astype(np.uint8)


def _similarities(features: NDArray[np.generic], labels: NDArray[np.int64]) -> Any:
    """Graph of touching segments, weights exp(-distance^2 / 255) of mean features: rag_mean_color for any number of channels."""
    from skimage import graph

    rag = graph.RAG(labels, connectivity=2)
    flat, count = labels.ravel(), np.bincount(labels.ravel())
    mean = np.stack([np.bincount(flat, c.ravel().astype(np.float64)) / count for c in np.moveaxis(features, -1, 0)], axis=-1)
    for n in rag.nodes:
        rag.nodes[n]["labels"] = [n]
    for a, b, edge in rag.edges(data=True):
        edge["weight"] = float(np.exp(-np.sum((mean[a] - mean[b]) ** 2) / 255.0))
    return rag
