//! Pretrains a masked autoencoder (PixMIM or MAE) on photos. Without arguments: the preset `demo` on
//! the bundled photos, in one to two minutes on two cores. `--help` lists the options, `doctor` tells what
//! was found on this machine.

mod bench_data;
mod cli;
mod doctor;
mod progress;

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser as _;
use pixmim::Result;
use pixmim::train::config::Key;
use pixmim::train::{run, signal};

use cli::{Cli, Command};
use progress::{Progress, say};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() => {
            let text = error.render().to_string();
            complain(1, text.strip_prefix("error: ").unwrap_or(&text).trim_end());
            return ExitCode::from(1);
        }
        Err(help) => {
            // A closed pipe is no reason to complain about help.
            let _ = help.print();
            return ExitCode::SUCCESS;
        }
    };
    let result = match (&cli.command, &cli.train.explain) {
        (Some(Command::Doctor), _) => {
            doctor::examine();
            Ok(())
        }
        (Some(Command::BenchData(recipe)), _) => {
            recipe.config().and_then(|c| bench_data::measure(&c))
        }
        (None, Some(key)) => explain(key),
        (None, None) => train(&cli.train),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(error.exit_code(), &error.to_string());
            ExitCode::from(error.exit_code())
        }
    }
}

fn train(arguments: &cli::Train) -> Result<()> {
    let job = arguments.job()?;
    let stop = signal::install()
        .map_err(pixmim::Error::io("install a signal handler in", "this process"))?;
    let mut progress = Progress::new(&job);
    let result = run::run(&job.config, &job.options, &stop, &mut |event| progress.tell(event));
    progress.clear();
    progress.close(&result?);
    Ok(())
}

fn explain(name: &str) -> Result<()> {
    let key = Key::find("--explain", name)?;
    say(key.explain()?.trim_end());
    Ok(())
}

/// Writes an error as all errors of this program look. There is no one left to tell if that fails.
fn complain(code: u8, why: &str) {
    let _ = writeln!(std::io::stderr(), "error[{code}]: {why}");
}
