//! Fixed two-dimensional sine-cosine positions (`util/pos_embed.py` of the MAE source).
//!
//! The patch in row `i` and column `j` gets `[sin(j w), cos(j w), sin(i w), cos(i w)]` with
//! `w_k = 10000^(-k / (dim / 4))`: columns first, whatever the names in the source say. The class token gets zeros.

/// `(1 + grid * grid, dim)`, row 0 the class token's, patches row by row. `dim` is a multiple of 4.
#[must_use]
pub fn table(grid: usize, dim: usize) -> Vec<f64> {
    let quarter = dim / 4;
    let mut table = vec![0.0; dim];
    for i in 0..grid {
        for j in 0..grid {
            for (coordinate, waves) in [(j, [f64::sin, f64::cos]), (i, [f64::sin, f64::cos])] {
                for wave in waves {
                    table.extend((0..quarter).map(|k| {
                        let omega = 10_000f64.powf(-(k as f64) / quarter as f64);
                        wave(coordinate as f64 * omega)
                    }));
                }
            }
        }
    }
    table
}

/// Resamples the table of a square grid to another grid, as MAE's `interpolate_pos_embed` does: bicubic with
/// `a = -0.75`, edges clamped, corners not aligned; the class token's row stays.
#[must_use]
pub fn interpolate(table: &[f64], grid: usize, to: usize, dim: usize) -> Vec<f64> {
    /// Taps of one output position: four clamped source indices with their weights.
    fn taps(x: usize, from: usize, to: usize) -> [(usize, f64); 4] {
        const A: f64 = -0.75;
        let near = |t: f64| ((A + 2.0) * t - (A + 3.0)) * t * t + 1.0;
        let far = |t: f64| ((A * t - 5.0 * A) * t + 8.0 * A) * t - 4.0 * A;
        let centre = (x as f64 + 0.5) * from as f64 / to as f64 - 0.5;
        let t = centre - centre.floor();
        let weights = [far(t + 1.0), near(t), near(1.0 - t), far(2.0 - t)];
        std::array::from_fn(|k| {
            let at = centre.floor() as i64 - 1 + k as i64;
            (at.clamp(0, from as i64 - 1) as usize, weights[k])
        })
    }
    let mut out = table[..dim].to_vec();
    for y in 0..to {
        for x in 0..to {
            let (rows, cols) = (taps(y, grid, to), taps(x, grid, to));
            out.extend((0..dim).map(|d| {
                rows.iter()
                    .flat_map(|&(i, wi)| cols.iter().map(move |&(j, wj)| (i, j, wi * wj)))
                    .map(|(i, j, w)| w * table[(1 + i * grid + j) * dim + d])
                    .sum::<f64>()
            }));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_close(got: f64, want: f64) {
        assert!((got - want).abs() <= 1e-8, "{got} {want}");
    }

    /// Entries of MAE's own table for 14 x 14 patches and width 768.
    #[test]
    fn the_table_is_that_of_mae() {
        let t = table(14, 768);
        let at = |patch: usize, d: usize| t[(1 + patch) * 768 + d];
        assert_eq!(t.len(), 197 * 768);
        assert!(t[..768].iter().all(|&x| x == 0.0));
        for (d, want) in [(0, 0.84147098), (192, 0.54030231), (384, 0.84147098), (576, 0.54030231)]
        {
            assert_close(at(15, d), want);
        }
        assert_close(at(1, 0), 0.84147098);
        assert_close(at(1, 1), 0.81525065);
        assert_eq!(at(14, 0), 0.0);
        assert_close(at(14, 384), 0.84147098);
        assert_close(at(14, 576), 0.54030231);
        assert_close(at(195, 0), 0.42016704);
        assert_close(at(195, 383), 0.99999907);
        assert_close(at(195, 767), 0.99999907);
        assert_close(t.iter().sum(), 69_594.493_859_17);
        assert_close(table(14, 512).iter().sum(), 46_340.333_102_67);
    }

    /// Values of torch's bicubic `interpolate`.
    #[test]
    fn interpolates_as_mae_does() {
        let squares = [9.0, 0.0, 1.0, 4.0, 9.0, 16.0, 25.0, 36.0, 49.0, 64.0];
        let out = interpolate(&squares, 3, 5, 1);
        assert_eq!(out[0], 9.0);
        let rows: Vec<&[f64]> = out[1..].chunks(5).collect();
        for (got, want) in rows[0].iter().zip([-0.904704, -0.874016, -0.44, 1.074016, 2.216704]) {
            assert_close(*got, want);
        }
        for (got, want) in rows[2].iter().zip([8.328, 11.068, 16.0, 22.012, 25.864]) {
            assert_close(*got, want);
        }
    }
}
