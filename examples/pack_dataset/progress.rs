//! What the program says while it works: one bar on a terminal, plain `key=value` lines elsewhere.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::program::say;

/// Redraws of the bar in a second.
const REDRAWS: u8 = 10;
/// A log gets a line at least this often, so that a slow run is not taken for a hung one.
const LINE_EVERY: Duration = Duration::from_secs(60);

pub(crate) struct Progress {
    /// None where lines are written.
    bar: Option<ProgressBar>,
    started: Instant,
    last_line: Instant,
    images: usize,
    all: usize,
    bad: usize,
}

impl Progress {
    pub(crate) fn new(all: usize) -> Self {
        let bar = std::io::stdout().is_terminal().then(|| {
            let target = ProgressDrawTarget::stdout_with_hz(REDRAWS);
            let bar = ProgressBar::with_draw_target(Some(all as u64), target);
            // Fails only for a template that cannot be read; then the bar looks as indicatif draws it.
            match ProgressStyle::with_template(
                "{wide_bar:.cyan/dim}  {pos}/{len}  {msg}  eta {eta}",
            ) {
                Ok(style) => bar.with_style(style.progress_chars("━╸─")),
                Err(_) => bar,
            }
        });
        let now = Instant::now();
        Self {
            bar: bar.filter(|bar| !bar.is_hidden()),
            started: now,
            last_line: now,
            images: 0,
            all,
            bad: 0,
        }
    }

    /// So many more images; `bad` of all could not be read.
    pub(crate) fn add(&mut self, images: usize, bad: usize) {
        self.images += images;
        self.bad = bad;
        if let Some(bar) = &self.bar {
            bar.set_message(format!("{:.0} img/s", self.images_per_s()));
            bar.set_position(self.images as u64);
        } else if self.last_line.elapsed() >= LINE_EVERY {
            self.line("");
        }
    }

    /// One more shard.
    pub(crate) fn note(&mut self, shards: usize, of: usize) {
        if self.bar.is_none() {
            self.line(&format!("shard={shards} of={of} "));
        }
    }

    fn line(&mut self, start: &str) {
        self.last_line = Instant::now();
        let speed = self.images_per_s();
        let eta = (self.all - self.images) as f64 / speed;
        say(&format!(
            "{start}images={} bad={} images_per_s={speed:.0} eta={eta:.0}",
            self.images, self.bad
        ));
    }

    /// Since it began.
    pub(crate) fn images_per_s(&self) -> f64 {
        self.images as f64 / self.started.elapsed().as_secs_f64()
    }

    /// Writes a line, above the bar if there is one.
    pub(crate) fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            None => say(line),
        }
    }

    /// Removes the bar, before last words.
    pub(crate) fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
