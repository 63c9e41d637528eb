//! How fast a run is, how much of the device's peak that takes, and how much of its time it waits for data.

use std::time::Duration;

/// Steps over which slow data is noticed, and the share of their time that counts as slow.
const SLOW_DATA: (u64, f64) = (100, 0.05);

/// Times and counts for the log.
#[derive(Default)]
pub(super) struct Pace {
    /// Steps of this call.
    steps: u64,
    /// Without the first step.
    total: Lap,
    /// Since the last logged line.
    lap: Lap,
    /// The last [`SLOW_DATA`] steps or fewer.
    data: Lap,
    told_slow_data: bool,
}

impl Pace {
    pub(super) fn add(&mut self, time: Duration, wait: Duration) {
        self.steps += 1;
        // The first step warms up caches and fills the loader.
        if self.steps > 1 {
            self.total.add(time, wait);
        }
        self.lap.add(time, wait);
        self.data.add(time, wait);
    }

    /// All steps of this call but the first; that one, if there is no other.
    pub(super) fn whole(&self) -> Lap {
        if self.total.steps > 0 { self.total } else { self.data }
    }

    /// The steps since the last logged line.
    pub(super) fn lap(&self) -> Lap {
        self.lap
    }

    /// Begins the next line.
    pub(super) fn next_lap(&mut self) {
        self.lap = Lap::default();
    }

    /// The share of time that slow data takes, when it is noticed for the first time.
    pub(super) fn slow_data(&mut self) -> Option<f64> {
        let (steps, share) = SLOW_DATA;
        if self.data.steps < steps {
            return None;
        }
        let waited = std::mem::take(&mut self.data).data_wait();
        let is_news = waited > share && !self.told_slow_data;
        self.told_slow_data |= is_news;
        is_news.then_some(waited)
    }
}

/// Some steps.
#[derive(Clone, Copy, Default)]
pub(super) struct Lap {
    steps: u64,
    time: Duration,
    /// Part of `time` spent waiting for data.
    wait: Duration,
}

impl Lap {
    fn add(&mut self, time: Duration, wait: Duration) {
        self.steps += 1;
        self.time += time;
        self.wait += wait;
    }

    /// 0 if there was no step.
    pub(super) fn images_per_s(&self, images: usize) -> f64 {
        let seconds = self.time.as_secs_f64().max(f64::MIN_POSITIVE);
        self.steps as f64 * images as f64 / seconds
    }

    /// Operations in a second, if a step has so many.
    pub(super) fn flops_per_s(&self, step_flops: f64) -> f64 {
        self.steps as f64 * step_flops / self.time.as_secs_f64().max(f64::MIN_POSITIVE)
    }

    pub(super) fn data_wait(&self) -> f64 {
        self.wait.as_secs_f64() / self.time.as_secs_f64().max(f64::MIN_POSITIVE)
    }

    /// Time that `steps` take at this pace; none if there was no step.
    pub(super) fn time_of(&self, steps: u64) -> Duration {
        self.time.div_f64(self.steps.max(1) as f64).mul_f64(steps as f64)
    }
}
