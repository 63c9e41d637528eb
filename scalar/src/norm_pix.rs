//! The squared error of one predicted number (He et al. 2021, arXiv:2111.06377, section 4; `norm_pix_loss` of the MAE
//! source).

use crate::Scalar;

/// Added to a target patch's variance.
pub const NORM_PIX_EPS: f64 = 1e-6;

/// How the numbers of a target patch are normalised before a prediction is compared with them: `(t - mean) / std`.
#[derive(Clone, Copy, Debug)]
pub struct PatchNorm<T> {
    shift: T,
    factor: T,
}

impl<T: Scalar> PatchNorm<T> {
    /// Compares with the target as it is.
    pub const NONE: Self = Self { shift: T::ZERO, factor: T::ONE };

    /// By the patch's mean and its variance, which has one less than the count of numbers below.
    #[inline(always)]
    #[must_use]
    pub fn new(mean: T, variance: T) -> Self {
        Self { shift: mean, factor: T::ONE / (variance + T::of(NORM_PIX_EPS)).sqrt() }
    }

    /// How far a predicted number is from the normalised target.
    #[inline(always)]
    #[must_use]
    pub fn error(self, pred: T, target: T) -> T {
        pred - (target - self.shift) * self.factor
    }

    /// The square of [`error`](Self::error).
    #[inline(always)]
    #[must_use]
    pub fn squared_error(self, pred: T, target: T) -> T {
        self.error(pred, target) * self.error(pred, target)
    }

    /// The derivative of `weight` times [`squared_error`](Self::squared_error) by the prediction.
    #[inline(always)]
    #[must_use]
    pub fn gradient(self, weight: T, pred: T, target: T) -> T {
        T::of(2.0) * weight * self.error(pred, target)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_normalised_by_its_patch_and_the_gradient_is_that_of_the_square() {
        // The patch (0, 2): mean 1, variance 2.
        let norm = PatchNorm::new(1.0f64, 2.0);
        let second = 1.0 / Scalar::sqrt(2.000_001f64);
        assert!((norm.error(3.0, 2.0) - (3.0 - second)).abs() <= 1e-15);
        assert!((PatchNorm::NONE.squared_error(3.0f64, 5.0) - 4.0).abs() <= 1e-15);
        let weighted = |pred| 0.7 * norm.squared_error(pred, 2.0);
        let difference = (weighted(3.0 + 1e-5) - weighted(3.0 - 1e-5)) / 2e-5;
        assert!((norm.gradient(0.7, 3.0, 2.0) - difference).abs() <= 1e-9);
    }
}
