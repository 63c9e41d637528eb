//! The learning rate: linear warm-up, then half a cosine (`util/lr_sched.py` of the MAE source), per step.

/// The learning rate's course over a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// Learning rate after the warm-up.
    pub peak: f64,
    /// Learning rate at the end.
    pub min: f64,
    /// Length of the warm-up, in steps.
    pub warmup: u64,
    /// Length of the run, in steps.
    pub total: u64,
}

impl Schedule {
    /// Learning rate of step `step`, counted from 0, where the warm-up starts at 0.
    #[must_use]
    pub fn lr(&self, step: u64) -> f64 {
        let Self { peak, min, warmup, total } = *self;
        if step < warmup {
            return peak * step as f64 / warmup as f64;
        }
        // A warm-up as long as the run leaves nothing to decay over.
        let done = (step - warmup) as f64 / total.saturating_sub(warmup).max(1) as f64;
        min + (peak - min) * 0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of MAE's own schedule: peak 2.4e-3, 40 epochs of warm-up, at the start of an epoch of 100 steps.
    #[test]
    fn the_course_is_that_of_mae() {
        let at = |epochs: u64, epoch: u64| {
            Schedule { peak: 2.4e-3, min: 0.0, warmup: 4000, total: 100 * epochs }.lr(100 * epoch)
        };
        for (epochs, epoch, want) in [
            (300, 0, 0.0),
            (300, 20, 0.0012),
            (300, 100, 0.002_098_212_89),
            (300, 150, 0.001_487_178_80),
            (300, 299, 8.7599e-8),
            (800, 100, 0.002_363_280_32),
            (800, 400, 0.001_299_095_21),
            (800, 799, 1.025_23e-8),
        ] {
            let got = at(epochs, epoch);
            assert!((got - want).abs() <= 1e-11, "{epochs} {epoch}: {got} {want}");
        }
    }

    #[test]
    fn a_warm_up_longer_than_the_run_stays_finite() {
        let schedule = Schedule { peak: 1.0, min: 0.1, warmup: 20, total: 10 };
        assert_eq!(schedule.lr(10), 0.5);
        assert!((0..40).all(|step| schedule.lr(step).is_finite()));
        let none = Schedule { peak: 1.0, min: 0.1, warmup: 0, total: 0 };
        assert_eq!(none.lr(0), 1.0);
    }
}
