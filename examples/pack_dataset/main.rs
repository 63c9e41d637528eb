//! Packs a dataset into shards: each photo is decoded and resized once, so that training from them needs neither. Any
//! source of the trainer will do: a folder of photos, `.tar` files, CIFAR-10, or shards themselves. docs/data.md says when
//! it pays.

mod cli;
mod pack;
mod plan;
#[path = "../program/mod.rs"]
mod program;
mod progress;
mod verify;

use std::process::ExitCode;

use pixmim::Error;
use pixmim::train::signal;

use cli::Cli;
use plan::Plan;

fn main() -> ExitCode {
    program::main(|cli: &Cli| {
        let stop =
            signal::install().map_err(Error::io("install a signal handler in", "this process"))?;
        match &cli.out {
            Some(out) => pack::pack(&Plan::new(cli, out)?, &stop).map(|()| ExitCode::SUCCESS),
            None => verify::verify(&cli.data, cli.threads(), &stop),
        }
    })
}
