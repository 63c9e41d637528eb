//! Pretrains a masked autoencoder (PixMIM or MAE) on photos. Without arguments: the preset `demo` on
//! the bundled photos, in one to two minutes on two cores. `--help` lists the options, `doctor` tells what
//! was found on this machine.

mod bench_data;
mod cli;
mod doctor;
#[path = "../program/mod.rs"]
mod program;
mod progress;

use std::process::ExitCode;

use pixmim::Result;
use pixmim::train::config::Key;
use pixmim::train::{run, signal};

use cli::{Cli, Command};
use program::say;
use progress::Progress;

fn main() -> ExitCode {
    program::main(|cli: &Cli| {
        match (&cli.command, &cli.train.explain) {
            (Some(Command::Doctor), _) => doctor::examine(),
            (Some(Command::BenchData(recipe)), _) => bench_data::measure(&recipe.config()?)?,
            (None, Some(key)) => explain(key)?,
            (None, None) => train(&cli.train)?,
        }
        Ok(ExitCode::SUCCESS)
    })
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
