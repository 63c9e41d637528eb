//! GELU in its exact form (Hendrycks and Gimpel 2016, arXiv:1606.08415).

use crate::Scalar;

/// `x cdf(x)`, cdf the normal distribution's.
#[inline(always)]
#[must_use]
pub fn gelu<T: Scalar>(x: T) -> T {
    x * x.normal_cdf_pdf().0
}

/// The derivative of [`gelu`]: `cdf(x) + x pdf(x)`.
#[inline(always)]
#[must_use]
pub fn gelu_slope<T: Scalar>(x: T) -> T {
    let (cdf, pdf) = x.normal_cdf_pdf();
    cdf + x * pdf
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slope_is_that_of_gelu() {
        for i in -60..=60 {
            let x = f64::from(i) / 10.0;
            let difference = (gelu(x + 1e-6) - gelu(x - 1e-6)) / 2e-6;
            assert!((gelu_slope(x) - difference).abs() <= 1e-9, "at {x}");
        }
        assert!((gelu(1.0f64) - 0.841_344_746_068_543).abs() <= 1e-15);
    }
}
