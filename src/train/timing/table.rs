//! The figures, for a reader and for a program.

use std::fmt::Write as _;
use std::time::Duration;

use super::{Row, StepProfile};
use crate::ops::cost::Roof;

/// A row as text, empty where there is nothing to say.
struct Cells {
    op: &'static str,
    direction: &'static str,
    calls: String,
    took: Duration,
    gb_per_s: String,
    tflop_per_s: String,
    roof: &'static str,
    of_roof: Option<f64>,
}

impl StepProfile {
    /// What a step takes, in one line: as it is, with marks, and in no op.
    #[must_use]
    pub fn summary(&self) -> String {
        let Self { micro_batches, images, plain, marked, rounds, recorded, device, .. } = self;
        let batch = match micro_batches {
            1 => format!("{images} images"),
            n => format!("{images} images (a step has {n} times as many)"),
        };
        let plain_is = if *recorded { "recorded as one graph" } else { "as the run does it" };
        format!(
            "{batch} and an update on {device}, medians of {rounds}: {} ms {plain_is}, {} ms op by op; of a step no op runs \
             in {:.1} %",
            digits(milliseconds(*plain)),
            digits(milliseconds(*marked)),
            100.0 * share(self.idle(), self.took())
        )
    }

    /// A line for each op and direction, the longest first, aligned.
    #[must_use]
    pub fn table(&self) -> String {
        let mut table = format!(
            "{:<16} {:<17} {:>6} {:>10} {:>8} {:>9} {:>9} {:>8}\n",
            "op", "direction", "calls", "ms", "of step", "GB/s", "TFLOP/s", "of roof"
        );
        for cells in self.cells() {
            let Cells { op, direction, calls, took, gb_per_s, tflop_per_s, roof, of_roof } = cells;
            let of_roof =
                of_roof.map(|share| format!("{:.1} %", 100.0 * share)).unwrap_or_default();
            let line = format!(
                "{op:<16} {direction:<17} {calls:>6} {:>10} {:>6.1} % {gb_per_s:>9} {tflop_per_s:>9} {of_roof:>8} {roof}",
                digits(milliseconds(took)),
                100.0 * share(took, self.took()),
            );
            let _ = writeln!(table, "{}", line.trim_end());
        }
        table
    }

    /// As [`table`](Self::table), as comma-separated values, with the summary in a comment above.
    #[must_use]
    pub fn csv(&self) -> String {
        let mut csv = format!(
            "# {}\nop,direction,calls,ms,share,gb_per_s,tflop_per_s,roof,roof_share\n",
            self.summary()
        );
        for cells in self.cells() {
            let Cells { op, direction, calls, took, gb_per_s, tflop_per_s, roof, of_roof } = cells;
            let of_roof = of_roof.map(|share| format!("{share:.4}")).unwrap_or_default();
            let _ = writeln!(
                csv,
                "{op},{direction},{calls},{},{:.5},{gb_per_s},{tflop_per_s},{roof},{of_roof}",
                digits(milliseconds(took)),
                share(took, self.took())
            );
        }
        csv
    }

    /// Each row, then the time in no op, then the whole.
    fn cells(&self) -> impl Iterator<Item = Cells> {
        let whole = |op, took| {
            let (direction, roof, of_roof) = ("", "", None);
            let [calls, gb_per_s, tflop_per_s] = [const { String::new() }; 3];
            Cells { op, direction, calls, took, gb_per_s, tflop_per_s, roof, of_roof }
        };
        let rows = self.rows().into_iter().map(|row| self.row(row));
        rows.chain([whole("no op", self.idle()), whole("step", self.took())])
    }

    fn row(&self, Row { op, direction, calls, took, cost }: Row) -> Cells {
        // What crosses a bus has a roof of its own.
        let crosses = ["upload", "read"].contains(&op);
        let peaks = self.peaks.filter(|_| !crosses && (cost.bytes > 0 || cost.flops > 0));
        Cells {
            op,
            direction,
            calls: calls.to_string(),
            took,
            gb_per_s: rate(cost.bytes, took, 1e9),
            tflop_per_s: rate(cost.flops, took, 1e12),
            roof: match peaks.map(|peaks| cost.roof(peaks)) {
                Some(Roof::Memory) => "memory",
                Some(Roof::Compute) => "compute",
                None => "",
            },
            of_roof: peaks.map(|peaks| cost.share(peaks, took)),
        }
    }
}

/// So much in a second, in a unit; empty for nothing.
pub(super) fn rate(amount: u64, took: Duration, unit: f64) -> String {
    match amount {
        0 => String::new(),
        _ => digits(amount as f64 / took.as_secs_f64().max(1e-9) / unit),
    }
}

/// A part of a whole; 0 of nothing.
pub(super) fn share(part: Duration, whole: Duration) -> f64 {
    part.as_secs_f64() / whole.as_secs_f64().max(f64::MIN_POSITIVE)
}

pub(super) fn milliseconds(time: Duration) -> f64 {
    1e3 * time.as_secs_f64()
}

/// Four digits that count, of what is small at least three decimals.
pub(super) fn digits(value: f64) -> String {
    let whole = if value >= 1.0 { value.log10().floor() as usize + 1 } else { 1 };
    format!("{value:.*}", 4_usize.saturating_sub(whole))
}
