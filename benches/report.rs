//! The rows of a run: printed, as a record, and as a chart.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pixmim::ops::cost::{Cost, Peaks, Roof};

/// What was measured.
#[derive(Clone)]
pub(crate) struct Row {
    pub(crate) op: String,
    pub(crate) direction: String,
    pub(crate) shape: String,
    /// Images, or parameters for ops that know no images.
    pub(crate) batch: usize,
    pub(crate) precision: &'static str,
    /// Median time of a call.
    pub(crate) took: Duration,
    /// Of steps and of the data path.
    pub(crate) images_per_second: Option<f64>,
    /// None for the data path: it has no roof.
    pub(crate) cost: Option<Cost>,
}

/// A run.
pub(crate) struct Report {
    /// Names and values: versions and devices.
    pub(crate) environment: Vec<(&'static str, String)>,
    /// Each with the roofs of its precision.
    pub(crate) rows: Vec<(Row, Peaks)>,
}

/// Names of the record's columns.
pub(crate) const COLUMNS: &str =
    "op,direction,shape,batch,precision,ms,images_per_s,gb_per_s,tflop_per_s,roof,share";

/// A row as text, number by number, empty where there is nothing to say.
struct Cells {
    ms: String,
    images_per_s: String,
    gb_per_s: String,
    tflop_per_s: String,
    roof: &'static str,
    share: Option<f64>,
}

impl Row {
    fn cells(&self, peaks: Peaks) -> Cells {
        let seconds = self.took.as_secs_f64();
        let rate = |amount: u64, unit: f64| match amount {
            0 => String::new(),
            _ => digits(amount as f64 / seconds / unit),
        };
        let Cost { bytes, flops } = self.cost.unwrap_or_default();
        Cells {
            ms: digits(1e3 * seconds),
            images_per_s: self.images_per_second.map(digits).unwrap_or_default(),
            gb_per_s: rate(bytes, 1e9),
            tflop_per_s: rate(flops, 1e12),
            roof: match self.cost.map(|cost| cost.roof(peaks)) {
                Some(Roof::Memory) => "memory",
                Some(Roof::Compute) => "compute",
                None => "",
            },
            share: self.cost.map(|cost| cost.share(peaks, self.took)),
        }
    }
}

impl Report {
    /// The rows for a reader, aligned.
    pub(crate) fn table(&self) -> String {
        let mut table = format!(
            "{:<16} {:<20} {:<26} {:>9} {:<9} {:>9} {:>9} {:>9} {:>9} {:>7} of roof\n",
            "op",
            "direction",
            "shape",
            "batch",
            "precision",
            "ms",
            "images/s",
            "GB/s",
            "TFLOP/s",
            "share"
        );
        for (row, peaks) in &self.rows {
            let Cells { ms, images_per_s, gb_per_s, tflop_per_s, roof, share } = row.cells(*peaks);
            let share = share.map(|share| format!("{:.1} %", 100.0 * share)).unwrap_or_default();
            let line = format!(
                "{:<16} {:<20} {:<26} {:>9} {:<9} {ms:>9} {images_per_s:>9} {gb_per_s:>9} {tflop_per_s:>9} \
                 {share:>7} {roof}",
                row.op, row.direction, row.shape, row.batch, row.precision
            );
            let _ = writeln!(table, "{}", line.trim_end());
        }
        table
    }

    /// The rows as comma-separated values, the environment in comments above them.
    pub(crate) fn record(&self) -> String {
        let mut record = String::new();
        for (name, value) in &self.environment {
            let _ = writeln!(record, "# {name}: {value}");
        }
        let _ = writeln!(record, "{COLUMNS}");
        for (row, peaks) in &self.rows {
            let Cells { ms, images_per_s, gb_per_s, tflop_per_s, roof, share } = row.cells(*peaks);
            let share = share.map(|share| format!("{share:.4}")).unwrap_or_default();
            let _ = writeln!(
                record,
                "{},{},{},{},{},{ms},{images_per_s},{gb_per_s},{tflop_per_s},{roof},{share}",
                row.op, row.direction, row.shape, row.batch, row.precision
            );
        }
        record
    }

    /// A bar for each row that has a roof: its share of it.
    pub(crate) fn chart(&self) -> String {
        const LINE: usize = 16;
        const TOP: usize = 44;
        const LEFT: f64 = 380.0;
        /// Of a share of 1. What is in a cache can be faster than the memory, up to where bars end.
        const WHOLE: f64 = 400.0;
        const MOST: f64 = 1.2;
        let drawn: Vec<_> = self
            .rows
            .iter()
            .filter_map(|(row, peaks)| {
                let Cells { roof, share, .. } = row.cells(*peaks);
                Some((row, roof, share?))
            })
            .collect();
        let (height, full) = (TOP + LINE * drawn.len() + 12, LEFT + WHOLE);
        let shown = self.environment.iter().filter(|(name, _)| *name != "found");
        let run: Vec<_> = shown.map(|(name, value)| format!("{name} {value}")).collect();
        let run = escape(&run.join(" · "));
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 960 {height}\" role=\"img\">\n\
             <style>\n\
             text {{ font: 11px sans-serif; fill: #222 }} .end {{ text-anchor: end }}\n\
             .memory {{ fill: #3574b8 }} .compute {{ fill: #c26a2e }} line {{ stroke: #888 }}\n\
             svg {{ background: #fff }}\n\
             @media (prefers-color-scheme: dark) {{ text {{ fill: #ddd }} svg {{ background: #161616 }} }}\n\
             </style>\n\
             <text x=\"12\" y=\"18\">Share of what this machine reaches: of a copy \
             <tspan class=\"memory\">(memory)</tspan>, or of a large product \
             <tspan class=\"compute\">(compute)</tspan>, whichever is nearer</text>\n\
             <text x=\"12\" y=\"36\">{run}</text>\n\
             <text class=\"end\" x=\"{}\" y=\"36\">100 %</text>\n",
            full + 36.0
        );
        for (index, (row, roof, share)) in drawn.into_iter().enumerate() {
            let top = TOP + LINE * index;
            let (foot, width) = (top + LINE - 4, WHOLE * share.clamp(0.0, MOST));
            let Row { op, direction, shape, precision, .. } = row;
            let label = escape(&format!("{op} {direction} {shape} {precision}"));
            let _ = writeln!(
                svg,
                "<text class=\"end\" x=\"{:.0}\" y=\"{foot}\">{label}</text>\
                 <rect class=\"{roof}\" x=\"{LEFT:.0}\" y=\"{}\" width=\"{width:.1}\" height=\"{}\"/>\
                 <text x=\"{:.1}\" y=\"{foot}\">{:.0} %</text>",
                LEFT - 8.0,
                top + 2,
                LINE - 4,
                LEFT + width + 5.0,
                100.0 * share
            );
        }
        let _ = writeln!(
            svg,
            "<line x1=\"{full}\" y1=\"{}\" x2=\"{full}\" y2=\"{}\"/>\n</svg>",
            TOP - 4,
            height - 8
        );
        svg
    }

    /// Writes record and chart into the folder, named by the time in UTC; their paths.
    pub(crate) fn write(&self, folder: &Path) -> std::io::Result<[PathBuf; 2]> {
        fs::create_dir_all(folder)?;
        let stem = stamp(SystemTime::now());
        let paths = ["csv", "svg"].map(|extension| folder.join(format!("{stem}.{extension}")));
        for (path, text) in paths.iter().zip([self.record(), self.chart()]) {
            fs::write(path, text)?;
        }
        Ok(paths)
    }
}

/// Four digits that count.
pub(crate) fn digits(value: f64) -> String {
    let whole = if value >= 1.0 { value.log10().floor() as i32 + 1 } else { 0 };
    // Small ones keep their leading digits too.
    let lead = if value > 0.0 && value < 0.1 { -(value.log10().floor() as i32) - 1 } else { 0 };
    format!("{value:.*}", usize::try_from(4 - whole + lead).unwrap_or(0))
}

/// `2024-02-29T13-05-59Z`.
pub(crate) fn stamp(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    // Years from March on, so that a leap day is the last (Hinnant, "chrono-compatible low-level date algorithms").
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = 400 * era + year + u64::from(month <= 2);
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}-{minute:02}-{second:02}Z")
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
