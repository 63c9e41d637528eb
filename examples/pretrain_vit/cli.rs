//! The command line: from options to a config and a place to write.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use clap::builder::PossibleValuesParser;
use clap::{Args, Parser, Subcommand};
use pixmim::train::config::{Assignment, Config, Layers, METHODS, PRESETS};
use pixmim::train::run::{Options, Resume};
use pixmim::{Error, Result};

use crate::program::quoted;

/// The photos that come with the repository.
pub(crate) const PHOTOS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/photos");
/// Where runs go unless `--out` says otherwise.
pub(crate) const RUNS: &str = "runs";

const EXAMPLES: &str = "\
Examples:
  pretrain_vit                                           the demo: bundled photos, 1 to 2 minutes
  pretrain_vit --preset tiny --data cifar-10-batches-bin
  pretrain_vit --preset base --data ~/photos --dry-run   images/s, memory and time; writes nothing
  pretrain_vit --preset base --data ~/photos --dry-run --profile   and where the time of a step goes
  pretrain_vit --method mae --steps 2000 --set optim.lr=5e-4
  pretrain_vit --resume                                  goes on with the newest run under runs/
  pretrain_vit doctor                                    what was found here, and what to do next

A config is laid together, each over the one before: --preset, --config, the environment
(PIXMIM_OPTIM__LR=1e-3), --method, --set and the other options. docs/config.md explains all keys.

Exit codes: 0 done, or stopped by a signal and saved; 1 a mistake in options or config; 2 no such
device; 3 training diverged; 4 data; 5 input or output; 70 a defect of pixmim.";

/// Pretrain a masked autoencoder (PixMIM or MAE) on photos.
#[derive(Debug, Parser)]
#[command(name = "pretrain_vit", version = pixmim::VERSION, after_help = EXAMPLES)]
#[command(max_term_width = 110, args_conflicts_with_subcommands = true)]
#[command(disable_help_subcommand = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    #[command(flatten)]
    pub(crate) train: Train,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Tell what was found on this machine, what is missing, and what to type next.
    Doctor,
    /// Time each stage of the data path on the images of --data, and say what would make it faster.
    BenchData(Recipe),
}

/// What is computed, and on what.
#[derive(Debug, Args)]
pub(crate) struct Recipe {
    /// Sizes and recipe to start from [default: demo].
    #[arg(long, value_name = "NAME", hide_default_value = true)]
    #[arg(value_parser = PossibleValuesParser::new(PRESETS.map(|(name, _)| name)))]
    preset: Option<String>,
    /// A TOML file with any part of a config, laid over the preset.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Set one key, such as optim.lr=1e-3; may be given again.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    assignments: Vec<String>,
    /// A folder tree of JPEG, PNG and WebP files, a folder of .tar files or packed shards, a .tar, or CIFAR-10
    /// binary batches [default: the bundled photos].
    #[arg(long, value_name = "PATH")]
    data: Option<String>,
    /// What is learned: pixmim (low-pass target, simple crop) or mae (raw target, random resized crop)
    /// [default: pixmim].
    #[arg(long, value_name = "NAME", value_parser = PossibleValuesParser::new(METHODS))]
    #[arg(hide_possible_values = true)]
    method: Option<String>,
    /// Where it computes [default: auto].
    #[arg(long, value_name = "NAME")]
    #[arg(value_parser = PossibleValuesParser::new(["auto", "cpu", "cuda", "simt"]))]
    device: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Train {
    #[command(flatten)]
    recipe: Recipe,
    /// Folder of the run [default: runs/<date>_<time>_<preset>_<method>, in UTC].
    #[arg(long, value_name = "FOLDER")]
    out: Option<String>,
    /// Go on with the run in --out, or else the newest under runs/; or with the run or checkpoint at PATH. Its
    /// config is the base; options given now are laid over it. Starts anew if there is no checkpoint yet.
    #[arg(long, value_name = "auto|PATH", num_args = 0..=1, default_missing_value = "auto")]
    resume: Option<String>,
    /// Length in updates of the weights.
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    steps: Option<String>,
    /// Length in passes over the data.
    #[arg(long, value_name = "N", allow_hyphen_values = true, conflicts_with = "steps")]
    epochs: Option<String>,
    /// Seed of every random choice.
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    seed: Option<String>,
    /// Measure some steps; tell speed, memory and the time it would take; write nothing.
    #[arg(long)]
    dry_run: bool,
    /// Before the first step, tell where the time of a step goes: each op's share, rates and calls. Written to the run's
    /// profile/, and shown in its report; with --dry-run only told. The run itself stays the same, bit for bit.
    #[arg(long)]
    profile: bool,
    /// Replace the run that --out holds.
    #[arg(long, conflicts_with = "resume")]
    overwrite: bool,
    /// Explain one key of the config, and exit.
    #[arg(long, value_name = "KEY")]
    pub(crate) explain: Option<String>,
}

/// What the command line asks for.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) config: Config,
    pub(crate) options: Options,
}

impl Train {
    /// Settles the config and the folder of the run. Writes nothing.
    pub(crate) fn job(&self) -> Result<Job> {
        let mut resume = match self.resume.as_deref() {
            None => Resume::No,
            Some("auto") => Resume::Auto,
            Some(path) => Resume::From(path.into()),
        };
        let above = self.layers(None)?;
        let mut out = above.text("log.out").filter(|out| !out.is_empty()).map(PathBuf::from);
        let base = match &resume {
            Resume::No => None,
            Resume::Auto => {
                out = out.or_else(|| newest_run(Path::new(RUNS)));
                out.as_ref().map(|run| run.join("config.toml"))
            }
            Resume::From(path) => {
                let run = run_of(path)?;
                let config = run.join("config.toml");
                let goes_on = out.as_ref().is_none_or(|out| *out == run);
                if run == *path && goes_on {
                    resume = Resume::Auto;
                } else if run == *path {
                    return Err(Error::config(
                        format!("--resume {}", path.display()),
                        "is a run folder, and --out names another; give the checkpoint to start from, a \
                         folder in its ckpt/",
                    ));
                }
                out = out.or(Some(run));
                Some(config)
            }
        };
        // A run that was killed before it wrote its config starts anew, as one without a checkpoint does.
        let base = base.filter(|config| config.is_file());
        let layers = if base.is_some() { self.layers(base.as_deref())? } else { above };
        let mut config = layers.finish()?;

        if config.data.path.as_os_str().is_empty() {
            config.data.path = self.bundled_photos()?;
        }
        let name = self.name(base.as_deref());
        config.log.out = match out {
            Some(out) => out,
            None => fresh_folder(Path::new(RUNS), name, config.method_name(), SystemTime::now()),
        };
        let words: Vec<_> =
            std::env::args_os().map(|word| quoted(&word.to_string_lossy())).collect();
        let options = Options {
            resume,
            overwrite: self.overwrite,
            dry_run: self.dry_run,
            profile: self.profile,
            title: format!("{name}, {}", config.method_name()),
            command: words.join(" "),
        };
        Ok(Job { config, options })
    }

    /// The layers of the config, over the config file of an earlier run if there is one.
    fn layers(&self, base: Option<&Path>) -> Result<Layers> {
        let of_the_run = [
            ("--out", "log.out", &self.out),
            ("--steps", "schedule.steps", &self.steps),
            ("--epochs", "schedule.epochs", &self.epochs),
            ("--seed", "runtime.seed", &self.seed),
        ];
        self.recipe.layers(base, &of_the_run)
    }

    /// The bundled photos are for the demo and for measuring; a long run on 64 photos would be a mistake.
    fn bundled_photos(&self) -> Result<PathBuf> {
        match self.recipe.preset.as_deref() {
            None | Some("demo") => Ok(PHOTOS.into()),
            Some(_) if self.dry_run => Ok(PHOTOS.into()),
            Some(preset) => Err(Error::config(
                "--data",
                format!("not given, and preset {preset} needs images; give --data FOLDER"),
            )),
        }
    }

    /// What the run is called after: the preset, the config file, or the folder of the run that goes on.
    fn name<'a>(&'a self, base: Option<&'a Path>) -> &'a str {
        let file = || self.recipe.config.as_deref()?.file_stem()?.to_str();
        let run = || base?.parent()?.file_name()?.to_str();
        self.recipe.preset.as_deref().or_else(file).or_else(run).unwrap_or("demo")
    }
}

impl Recipe {
    /// The config, the bundled photos standing in for data that nobody named.
    pub(crate) fn config(&self) -> Result<Config> {
        let mut config = self.layers(None, &[])?.finish()?;
        if config.data.path.as_os_str().is_empty() {
            config.data.path = PHOTOS.into();
        }
        Ok(config)
    }

    /// The layers of the config, over the config file of an earlier run if there is one, and under the `options`: each with
    /// the key that it sets.
    fn layers(
        &self,
        base: Option<&Path>,
        options: &[(&str, &str, &Option<String>)],
    ) -> Result<Layers> {
        let mut layers = Layers::new();
        if let Some(base) = base {
            layers.file(base)?;
        }
        match (&self.preset, base) {
            (Some(preset), _) => layers.preset(preset)?,
            (None, None) => layers.preset("demo")?,
            (None, Some(_)) => {}
        }
        if let Some(file) = &self.config {
            layers.file(file)?;
        }
        layers.environment(environment()?)?;
        if let Some(method) = &self.method {
            layers.method(method)?;
        }
        let mut assignments = self
            .assignments
            .iter()
            .map(|text| Assignment::parse(text))
            .collect::<Result<Vec<_>>>()?;
        let own =
            [("--data", "data.path", &self.data), ("--device", "runtime.device", &self.device)];
        for &(option, key, value) in own.iter().chain(options) {
            if let Some(value) = value.clone() {
                assignments.push(Assignment { place: option.into(), key: key.into(), value });
            }
        }
        layers.assign(&assignments)?;
        Ok(layers)
    }
}

/// The variables that may set keys.
fn environment() -> Result<Vec<(String, String)>> {
    let mut variables = Vec::new();
    for (name, value) in std::env::vars_os() {
        let Some(name) = name.to_str().filter(|name| name.starts_with("PIXMIM_")) else { continue };
        let Ok(value) = value.into_string() else {
            return Err(Error::config(name, "is not UTF-8 text"));
        };
        variables.push((name.to_owned(), value));
    }
    Ok(variables)
}

/// The run folder that a path given to `--resume` means: the path, or the run whose checkpoint it is.
fn run_of(path: &Path) -> Result<PathBuf> {
    let place = format!("--resume {}", path.display());
    if !path.is_dir() {
        return Err(Error::config(
            place,
            "no such folder; give a run folder or a checkpoint folder",
        ));
    }
    let run_of_checkpoint = path.parent().and_then(Path::parent);
    [Some(path), run_of_checkpoint]
        .into_iter()
        .flatten()
        .find(|folder| folder.join("config.toml").is_file())
        .map(Path::to_owned)
        .ok_or_else(|| {
            Error::config(
                place,
                "is neither a run folder with its config.toml nor a checkpoint in one",
            )
        })
}

/// The run under `runs` that wrote a checkpoint last.
fn newest_run(runs: &Path) -> Option<PathBuf> {
    let last_checkpoint = |run: &Path| {
        let checkpoints = std::fs::read_dir(run.join("ckpt")).ok()?.flatten();
        checkpoints
            .filter(|entry| entry.file_name().to_string_lossy().starts_with("step-"))
            .filter_map(|entry| entry.metadata().and_then(|data| data.modified()).ok())
            .max()
    };
    let folders = std::fs::read_dir(runs).ok()?.flatten().map(|entry| entry.path());
    folders.filter_map(|run| Some((last_checkpoint(&run)?, run))).max().map(|(_, run)| run)
}

/// `runs/2026-11-23_1530_demo_pixmim`, with a number behind it if that is taken.
fn fresh_folder(runs: &Path, name: &str, method: &str, now: SystemTime) -> PathBuf {
    let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
    let (year, month, day) = civil_date(since / 86_400);
    let (hour, minute) = (since / 3600 % 24, since / 60 % 60);
    let stem = format!("{year:04}-{month:02}-{day:02}_{hour:02}{minute:02}_{name}_{method}");
    let mut folder = runs.join(&stem);
    let mut number = 2;
    while folder.exists() {
        folder = runs.join(format!("{stem}-{number}"));
        number += 1;
    }
    folder
}

/// Year, month and day (UTC) of a day counted from 1970-01-01, in the proleptic Gregorian calendar.
fn civil_date(days: u64) -> (u64, u64, u64) {
    // Years that begin in March end with the leap day, and their months follow one linear rule.
    let days = days + 719_468; // from 0000-03-01
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
}
