//! Where pixels and patches are.

/// The pixel that lies at `i` when `0..n` is continued by reflection that does not repeat the edge:
/// `.. 2 1 | 0 1 2 .. n-1 | n-2 n-3 ..`. Holds for `-n < i < 2 n - 1`.
#[inline]
#[must_use]
pub const fn reflect(i: i64, n: usize) -> usize {
    let last = n as i64 - 1;
    let i = i.abs();
    (if i > last { 2 * last - i } else { i }) as usize
}

/// Row and column of the first pixel of a patch: patches of `patch_size` pixels a side are numbered along the rows, `grid`
/// of them in a row.
#[inline]
#[must_use]
pub const fn patch_corner(patch: usize, grid: usize, patch_size: usize) -> (usize, usize) {
    (patch / grid * patch_size, patch % grid * patch_size)
}

/// The patch that pixel `(y, x)` is in, numbered as for [`patch_corner`].
#[inline]
#[must_use]
pub const fn patch_of(y: usize, x: usize, grid: usize, patch_size: usize) -> usize {
    y / patch_size * grid + x / patch_size
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reflection_does_not_repeat_the_edge() {
        let found: [usize; 9] = core::array::from_fn(|i| reflect(i as i64 - 2, 5));
        assert_eq!(found, [2, 1, 0, 1, 2, 3, 4, 3, 2]);
    }

    #[test]
    fn patches_are_numbered_along_the_rows() {
        assert_eq!(patch_corner(0, 3, 4), (0, 0));
        assert_eq!(patch_corner(5, 3, 4), (4, 8));
        assert_eq!(patch_of(7, 11, 3, 4), 5);
        assert_eq!(patch_of(8, 0, 3, 4), 6);
    }
}
