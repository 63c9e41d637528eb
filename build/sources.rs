//! The kernel sources: which files there are, which kernels each declares, and what each includes.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::{fs, io};

/// One `KERNEL(name, ..)` line.
pub(crate) struct Kernel {
    pub(crate) name: String,
    /// Declared with `HOT_KERNEL`: may not spill registers.
    pub(crate) hot: bool,
}

/// A file of kernels.
pub(crate) struct Source {
    /// Relative to the package, as in messages: `kernels/gelu.cu`.
    pub(crate) path: PathBuf,
    pub(crate) kernels: Vec<Kernel>,
}

impl Source {
    /// `gelu` for `kernels/gelu.cu`.
    pub(crate) fn stem(&self) -> &str {
        self.path.file_stem().and_then(|stem| stem.to_str()).expect("found by a name in UTF-8")
    }
}

/// Files in `folder` (not below) with this extension, sorted.
pub(crate) fn files(folder: &str, extension: &str) -> Result<Vec<PathBuf>, String> {
    let broken = |error: io::Error| format!("cannot read {folder}: {error}");
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(broken)? {
        let path = entry.map_err(broken)?.path();
        if path.extension().is_some_and(|e| e == extension) && path.to_str().is_some() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Reads the kernels that a file declares.
pub(crate) fn read(path: &Path) -> Result<Source, String> {
    let text = text(path)?;
    let mut kernels = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let (hot, rest) = match (line.strip_prefix("KERNEL("), line.strip_prefix("HOT_KERNEL(")) {
            (Some(rest), _) => (false, rest),
            (_, Some(rest)) => (true, rest),
            _ => continue,
        };
        let name = rest.split(',').next().unwrap_or_default().trim();
        let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        if name.is_empty() || !name.chars().all(is_name) || !rest.contains(')') {
            return Err(format!(
                "{}:{number}: a kernel is declared on one line as KERNEL(name_in_lower_case, Params, threads, blocks)",
                path.display()
            ));
        }
        kernels.push(Kernel { name: name.to_owned(), hot });
    }
    Ok(Source { path: path.to_owned(), kernels })
}

/// A hash of `path` and of every file below `kernels` that it includes, except those below `skip`.
pub(crate) fn hash(path: &Path, skip: Option<&str>) -> Result<u64, String> {
    let skip = skip.and_then(|folder| fs::canonicalize(folder).ok());
    let mut found = BTreeSet::new();
    let mut left = vec![fs::canonicalize(path).map_err(|e| format!("{}: {e}", path.display()))?];
    while let Some(path) = left.pop() {
        if skip.as_ref().is_none_or(|skip| !path.starts_with(skip)) && found.insert(path.clone()) {
            left.extend(included(&path)?);
        }
    }
    let mut state = Fnv::default();
    for path in found {
        let name = path.file_name().map(|name| name.as_encoded_bytes()).unwrap_or_default();
        state.write(name).write(text(&path)?.as_bytes());
    }
    Ok(state.0)
}

/// The files that `path` includes by name, whatever `#if` they stand under. Those not found are the compiler's to report.
fn included(path: &Path) -> Result<Vec<PathBuf>, String> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let names = text(path)?;
    let names = names.lines().filter_map(|line| {
        line.trim_start()
            .strip_prefix('#')?
            .trim_start()
            .strip_prefix("include \"")?
            .split('"')
            .next()
    });
    let find = |name: &str| {
        [folder, Path::new("kernels")].iter().find_map(|f| fs::canonicalize(f.join(name)).ok())
    };
    Ok(names.filter_map(find).collect())
}

fn text(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("cannot read {}: {error}", path.display()))
}

/// FNV-1a of 64 bits: the same in every release of Rust, as recorded hashes must be.
pub(crate) struct Fnv(pub(crate) u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv {
    /// Adds a part and where it ends.
    pub(crate) fn write(&mut self, part: &[u8]) -> &mut Self {
        for byte in part.iter().copied().chain((part.len() as u64).to_le_bytes()) {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
        self
    }
}
