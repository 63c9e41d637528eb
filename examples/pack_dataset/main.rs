//! Packs a dataset into shards: each photo is decoded and resized once, so that training from them needs neither. Any
//! source of the trainer will do: a folder of photos, `.tar` files, CIFAR-10, or shards themselves. docs/data.md says when
//! it pays.

mod cli;
mod pack;
mod plan;
mod progress;
mod verify;

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser as _;
use pixmim::train::signal;
use pixmim::{Error, Result};

use cli::Cli;
use plan::Plan;

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
    match run(&cli) {
        Ok(code) => code,
        Err(error) => {
            complain(error.exit_code(), &error.to_string());
            ExitCode::from(error.exit_code())
        }
    }
}

fn run(cli: &Cli) -> Result<ExitCode> {
    let stop =
        signal::install().map_err(Error::io("install a signal handler in", "this process"))?;
    match &cli.out {
        Some(out) => pack::pack(&Plan::new(cli, out)?, &stop).map(|()| ExitCode::SUCCESS),
        None => verify::verify(&cli.data, cli.threads(), &stop),
    }
}

/// Writes an error as all errors of this program look. There is no one left to tell if that fails.
fn complain(code: u8, why: &str) {
    let _ = writeln!(std::io::stderr(), "error[{code}]: {why}");
}
