//! What the programs among the examples have in common: how they read their arguments, speak, and end.

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser;
use pixmim::Result;

/// Parses the command line, runs the program, and says what went wrong in one sentence.
pub(crate) fn main<C: Parser>(run: impl FnOnce(&C) -> Result<ExitCode>) -> ExitCode {
    let cli = match C::try_parse() {
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

/// Writes a line to standard output. A reader that went away (`| head`) does not end the work.
pub(crate) fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Writes an error as all errors of these programs look. There is no one left to tell if that fails.
fn complain(code: u8, why: &str) {
    let _ = writeln!(std::io::stderr(), "error[{code}]: {why}");
}

/// A word as a POSIX shell reads it.
pub(crate) fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,:+@%".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}
