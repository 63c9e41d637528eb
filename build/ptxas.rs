//! What `ptxas -v` reports of each kernel.

use std::fmt;

/// What one kernel uses on one architecture.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Usage {
    pub(crate) kernel: String,
    /// As `sm_90a`.
    pub(crate) arch: String,
    /// Of a thread.
    pub(crate) registers: u32,
    /// Bytes of a thread, functions that were not inlined included.
    pub(crate) spill_stores: u32,
    /// Bytes of a thread, functions that were not inlined included.
    pub(crate) spill_loads: u32,
    /// Static bytes of a block.
    pub(crate) shared: u32,
    /// Bytes of a thread.
    pub(crate) stack: u32,
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kernel, arch, registers, spill_stores, spill_loads, shared, stack } = self;
        write!(
            f,
            "{kernel:<32} {arch:<7} {registers:>9} {spill_stores:>12} {spill_loads:>11} {shared:>6} {stack:>6}"
        )
    }
}

/// Reads the report of one file, all architectures in it.
pub(crate) fn parse(report: &str) -> Vec<Usage> {
    let mut found: Vec<Usage> = Vec::new();
    for line in report.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let mut quoted = rest.split('\'');
            let kernel = quoted.next().unwrap_or_default().to_owned();
            let arch = quoted.nth(1).unwrap_or_default().to_owned();
            found.push(Usage { kernel, arch, ..Usage::default() });
        }
        let Some(usage) = found.last_mut().filter(|_| !line.starts_with("ptxas warning")) else {
            continue;
        };
        for part in line.split(',') {
            let number = || part.split_whitespace().find_map(|word| word.parse::<u32>().ok());
            let is = |what: &str| part.trim_end().ends_with(what);
            // Functions that were not inlined follow their kernel, each with frame and spills of its own.
            if is("bytes stack frame") {
                usage.stack += number().unwrap_or_default();
            } else if is("bytes spill stores") {
                usage.spill_stores += number().unwrap_or_default();
            } else if is("bytes spill loads") {
                usage.spill_loads += number().unwrap_or_default();
            } else if is("registers") && part.contains(": Used ") {
                usage.registers = number().unwrap_or_default();
            } else if is("bytes smem") {
                usage.shared = number().unwrap_or_default();
            }
        }
    }
    found
}

/// The lines of a report that are not about usage: warnings, if any.
pub(crate) fn warnings(report: &str) -> impl Iterator<Item = &str> {
    let is_usage = |line: &str| {
        line.starts_with("ptxas info")
            || line.trim_start().split_once(" bytes stack frame").is_some()
    };
    report.lines().filter(move |line| {
        !line.trim().is_empty() && !line.starts_with("Remark:") && !is_usage(line)
    })
}
