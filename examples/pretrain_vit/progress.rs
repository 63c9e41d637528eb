//! What a run says while it works: one bar on a terminal, plain `key=value` lines elsewhere.

use std::io::{IsTerminal as _, Write as _};
use std::path::Path;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use pixmim::train::StepRecord;
use pixmim::train::run::{Event, Plan, Summary};
use pixmim::train::timing::StepProfile;

use crate::cli::Job;
use crate::program::{quoted, say};

/// Redraws of the bar in a second.
const REDRAWS: u8 = 10;
/// A log gets a line at least this often, so that a slow run is not taken for a hung one.
const LINE_EVERY: Duration = Duration::from_secs(60);

/// Shows the events of a run.
pub(crate) struct Progress {
    /// None where lines are written.
    bar: Option<ProgressBar>,
    dry_run: bool,
    global_batch: usize,
    /// The run's name and the command line.
    what: String,
    plan: Option<Plan>,
    last_line: Instant,
}

impl Progress {
    pub(crate) fn new(job: &Job) -> Self {
        let bar = std::io::stdout().is_terminal().then(|| {
            ProgressBar::with_draw_target(None, ProgressDrawTarget::stdout_with_hz(REDRAWS))
        });
        Self {
            bar: bar.filter(|bar| !bar.is_hidden()),
            dry_run: job.options.dry_run,
            global_batch: job.config.optim.global_batch,
            what: format!("{}: {}", job.options.title, job.options.command),
            plan: None,
            last_line: Instant::now(),
        }
    }

    /// Shows one event.
    pub(crate) fn tell(&mut self, event: Event<'_>) {
        match event {
            Event::Start(plan) => self.start(plan),
            Event::Step { record, smoothed_loss, eta, logged } => {
                self.step(record, smoothed_loss, eta, logged);
            }
            Event::Profile(profile, folder) => self.profile(profile, folder),
            Event::Picture(path) => self.note(&format!("picture={}", path_text(path))),
            Event::Checkpoint(path) => self.note(&format!("checkpoint={}", path_text(path))),
            Event::Warning(text) => match &self.bar {
                Some(bar) => bar.println(format!("warning: {text}")),
                None => drop(writeln!(std::io::stderr(), "warning: {text}")),
            },
            _ => {}
        }
    }

    /// Removes the bar, before last words.
    pub(crate) fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    /// The last line of a run that ended in good order.
    pub(crate) fn close(&self, summary: &Summary) {
        let speed = summary.images_per_s;
        if self.dry_run {
            say(&format!(
                "images/s  {speed:.1}, {:.0} % of the time waiting for data",
                100.0 * summary.data_wait
            ));
            if summary.mfu.is_finite() {
                say(&format!(
                    "products  {} TFLOP/s, {:.0} % of what a large product reaches here",
                    significant(summary.tflop_per_s),
                    100.0 * summary.mfu
                ));
            }
            if let Some(plan) = &self.plan {
                let steps = plan.steps - plan.resumed_from.unwrap_or(0).min(plan.steps);
                let seconds = steps as f64 * self.global_batch as f64 / speed;
                say(&format!("time      {} for {steps} steps", in_words(seconds)));
            }
            say("dry run   nothing was written");
            return;
        }
        let report = summary.report.as_deref().map_or("none".into(), path_text);
        let word = if summary.interrupted { "stopped" } else { "done" };
        let mut line = format!(
            "{word} steps={} loss={:.4} images_per_s={speed:.0} report={report}",
            summary.steps, summary.loss
        );
        if let (true, Some(folder)) = (summary.interrupted, self.folder()) {
            let program = std::env::args().next().unwrap_or_else(|| "pretrain_vit".into());
            line.push_str(&format!(
                " resume with: {} --resume {}",
                quoted(&program),
                path_text(folder)
            ));
        }
        say(&line);
    }

    fn folder(&self) -> Option<&Path> {
        self.plan.as_ref()?.folder.as_deref()
    }

    fn start(&mut self, plan: &Plan) {
        say(&format!("pixmim {} | {}", pixmim::VERSION, self.what));
        say(&format!("device    {}", plan.device));
        if let Some(peak) = &plan.peak {
            say(&format!(
                "peak      {} TFLOP/s in a product of {side} x {side}, measured in {:.2} s; a step has {} TFLOP",
                significant(peak.flops_per_s / 1e12),
                peak.took.as_secs_f64(),
                significant(plan.step_cost.flops as f64 / 1e12),
                side = peak.side
            ));
        }
        say(&format!("batch     {}", plan.batch));
        say(&format!("lr        {} at its peak", scientific(plan.lr)));
        say(&format!("data      {} images: {}", plan.images, plan.source));
        say(&format!(
            "model     {:.1} M parameters, {:.0} MiB of memory",
            plan.parameters as f64 / 1e6,
            plan.memory_bytes as f64 / f64::from(1 << 20)
        ));
        say(&format!("steps     {}, {} in an epoch", plan.steps, plan.steps_per_epoch));
        if let Some(folder) = &plan.folder {
            say(&format!("run       {}", folder.display()));
        }
        match plan.resumed_from {
            Some(step) => say(&format!("resume    after step {step}")),
            None => say("resume    no, from the first step"),
        }
        if let Some(bar) = &self.bar {
            bar.set_length(plan.steps);
            bar.set_position(plan.resumed_from.unwrap_or(0));
            bar.reset_eta();
            let style = ProgressStyle::with_template(
                "{prefix}  {wide_bar:.cyan/dim}  step {pos}/{len}\n{wide_msg}",
            );
            // Fails only for a template that cannot be read; then the bar looks as indicatif draws it.
            if let Ok(style) = style {
                bar.set_style(style.progress_chars("━╸─"));
            }
        }
        self.plan = Some(plan.clone());
    }

    fn step(&mut self, record: &StepRecord, smoothed_loss: f64, eta: Duration, logged: bool) {
        if let Some(bar) = &self.bar {
            let mfu = match record.mfu {
                mfu if mfu.is_finite() => format!("  MFU {:.0}%", 100.0 * mfu),
                _ => String::new(),
            };
            bar.set_prefix(format!("epoch {:.2}{mfu}", record.epoch));
            // 80 columns hold it all; a narrower terminal cuts off the end.
            bar.set_message(format!(
                "loss {:.4} (ema {smoothed_loss:.4})  lr {:.1e}  |g| {:.2}  {:.0} img/s  data {:.0}%  eta {}",
                record.loss,
                record.lr,
                record.grad_norm,
                record.images_per_s,
                100.0 * record.data_wait,
                in_words(eta.as_secs_f64()),
            ));
            bar.set_position(record.step);
        } else if logged || self.last_line.elapsed() >= LINE_EVERY {
            self.last_line = Instant::now();
            let mfu = match record.mfu {
                mfu if mfu.is_finite() => format!(" mfu={mfu:.2}"),
                _ => String::new(),
            };
            say(&format!(
                "step={} epoch={:.2} loss={:.4} ema={smoothed_loss:.4} lr={} gnorm={:.2} images_per_s={:.0}{mfu} data={:.2} eta={}",
                record.step,
                record.epoch,
                record.loss,
                scientific(record.lr),
                record.grad_norm,
                record.images_per_s,
                record.data_wait,
                eta.as_secs(),
            ));
        }
    }

    fn profile(&self, profile: &StepProfile, folder: Option<&Path>) {
        say(&format!("profile   {}", profile.summary()));
        say(profile.table().trim_end());
        if let Some(folder) = folder {
            self.note(&format!("profile={}", path_text(folder)));
        }
    }

    /// Something was written. A log names it; on a terminal the run folder was named, and that is enough.
    fn note(&self, line: &str) {
        if self.bar.is_none() {
            say(line);
        }
    }
}

fn path_text(path: &Path) -> String {
    quoted(&path.to_string_lossy())
}

/// `1.500e-04`: the exponent with sign and two digits, as C and Python write it.
fn scientific(number: f64) -> String {
    let text = format!("{number:.3e}");
    match text.split_once('e') {
        Some((mantissa, exponent)) => {
            let exponent: i32 = exponent.parse().unwrap_or(0);
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{mantissa}e{sign}{:02}", exponent.abs())
        }
        None => text,
    }
}

/// Three digits that count: `0.0123`, `4.56`, `789`.
fn significant(number: f64) -> String {
    let whole = if number > 0.0 { number.log10().floor() as i32 + 1 } else { 0 };
    format!("{number:.*}", usize::try_from(3 - whole).unwrap_or(0))
}

/// A duration to the two largest units that count: `2 d 3 h`, `6 min 12 s`.
fn in_words(seconds: f64) -> String {
    if !seconds.is_finite() {
        return "unknown".into();
    }
    let seconds = seconds.round() as u64;
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min {} s", seconds % 60),
        (0, ..) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}
