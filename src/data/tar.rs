//! Images in `.tar` files, as `WebDataset` has them. They are read in place: opening goes from header to header, and a
//! sample is one positioned read. Nothing is ever unpacked.
//!
//! Samples are the regular files whose names end as those of images do; links, folders and names that begin with a dot
//! are passed over. `x.cls`, a decimal number, is the label of the images of the same key: those named `x.` and anything.

use std::cell::Cell;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use crate::data::Image;
use crate::data::decode::{self, Options};
use crate::data::folder::is_image_name;
use crate::data::source::unreadable;
use crate::{Error, Result};

/// Labels are below this, so that a number gone wrong does not make a billion classes.
const MAX_CLASSES: u32 = 1 << 16;
/// Most bytes of a `.cls` member.
const MAX_LABEL_BYTES: u64 = 32;
/// Most bytes between two members' contents: headers and long names.
const MAX_HEADER_BYTES: u64 = 1 << 20;

/// Images in one `.tar` or several.
#[derive(Debug)]
pub struct Tar {
    path: PathBuf,
    options: Options,
    files: Vec<PathBuf>,
    members: Vec<Member>,
    classes: Vec<String>,
}

/// An image in a file.
#[derive(Debug)]
struct Member {
    /// Which of the files.
    file: u32,
    label: Option<u32>,
    offset: u64,
    size: u64,
    name: Box<str>,
}

impl Tar {
    /// Opens `files`, which are `path` or lie in it.
    pub(super) fn open(path: &Path, files: Vec<PathBuf>, options: &Options) -> Result<Self> {
        // Each header may be a wait for the disk, so that files are gone through side by side.
        let scans: Vec<_> = files.par_iter().map(|file| scan(file)).collect();
        let mut members = Vec::new();
        for (file, scan) in (0..).zip(scans) {
            members.extend(scan?.into_iter().map(|member| Member { file, ..member }));
        }
        if members.is_empty() {
            return Err(Error::data(
                path,
                "has no member that ends in .jpg, .jpeg, .png or .webp; set data.path to other data",
            ));
        }
        let largest = members.iter().filter_map(|member| member.label).max();
        let classes = (0..largest.map_or(0, |label| label + 1)).map(|label| label.to_string());
        Ok(Self {
            path: path.into(),
            options: *options,
            files,
            members,
            classes: classes.collect(),
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn len(&self) -> usize {
        self.members.len()
    }

    pub(super) fn name(&self, sample: usize) -> String {
        let Member { file, name, .. } = &self.members[sample];
        let file = self.files[*file as usize].file_name().unwrap_or_default();
        format!("{}:{name}", file.display())
    }

    pub(super) fn label(&self, sample: usize) -> Option<usize> {
        self.members[sample].label.map(|label| label as usize)
    }

    pub(super) fn classes(&self) -> &[String] {
        &self.classes
    }

    /// Bytes of a member.
    pub(super) fn size(&self, sample: usize) -> u64 {
        self.members[sample].size
    }

    pub(super) fn read(&self, sample: usize) -> Result<Image, String> {
        let Member { file, offset, size, .. } = self.members[sample];
        self.options.check_file(size).map_err(|e| e.to_string())?;
        let failed = |e: io::Error| e.to_string();
        // A handle of its own, whose position no other thread moves.
        let mut file = File::open(&self.files[file as usize]).map_err(failed)?;
        file.seek(SeekFrom::Start(offset)).map_err(failed)?;
        let mut bytes = vec![0; size as usize];
        file.read_exact(&mut bytes).map_err(failed)?;
        decode::decode(&bytes, &self.options).map_err(|e| e.to_string())
    }
}

/// Name of a compression, by the first bytes of a file.
fn compression(start: &[u8]) -> Option<&'static str> {
    match start {
        [0x1F, 0x8B, ..] => Some("gzip"),
        [0x28, 0xB5, 0x2F, 0xFD, ..] => Some("zstd"),
        [0xFD, b'7', b'z', b'X', b'Z', 0, ..] => Some("xz"),
        [b'B', b'Z', b'h', ..] => Some("bzip2"),
        [b'P', b'K', 3, 4, ..] => Some("zip"),
        _ => None,
    }
}

/// The images of one file, in order, with `file` 0.
fn scan(path: &Path) -> Result<Vec<Member>> {
    let failed = |e| unreadable(path, &e);
    let damaged = |why: String| Error::data(path, format!("{why}; fetch or make it again"));
    let mut file = File::open(path).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    let mut start = Vec::new();
    file.by_ref().take(8).read_to_end(&mut start).map_err(failed)?;
    if let Some(name) = compression(&start) {
        return Err(Error::data(
            path,
            format!("is compressed ({name}) and cannot be read in place; decompress it to a .tar"),
        ));
    }
    file.rewind().map_err(failed)?;

    let budget = Cell::new(MAX_HEADER_BYTES);
    let mut archive = tar::Archive::new(Metered { file, budget: &budget });
    let mut members = Vec::new();
    let mut labels = HashMap::new();
    let not_a_tar = |e: io::Error| damaged(format!("is no .tar file, or a damaged one ({e})"));
    for entry in archive.entries_with_seek().map_err(not_a_tar)? {
        let mut entry = entry.map_err(not_a_tar)?;
        budget.set(MAX_HEADER_BYTES);
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let (offset, size) = (entry.raw_file_position(), entry.size());
        if !entry.header().entry_type().is_file() || is_hidden(&name) {
            continue;
        }
        if offset.checked_add(size).is_none_or(|end| end > length) {
            return Err(damaged(format!("is truncated: it ends within its member {name}")));
        }
        if is_image_name(Path::new(&name)) {
            members.push(Member { file: 0, label: None, offset, size, name: name.into() });
        } else if let Some(key) = name.strip_suffix(".cls")
            && size <= MAX_LABEL_BYTES
        {
            let mut text = String::new();
            // What is no text is no number, and its image has no label.
            let _ = entry.read_to_string(&mut text);
            let label = text.trim().parse().ok().filter(|label| *label < MAX_CLASSES);
            labels.insert(key.to_owned(), label);
        }
    }
    for member in &mut members {
        member.label = labels.get(key(&member.name)).copied().flatten();
    }
    Ok(members)
}

/// What the members of one `WebDataset` sample share: the name up to the first dot behind the folders.
fn key(name: &str) -> &str {
    let file = name.rfind('/').map_or(0, |slash| slash + 1);
    name[file..].find('.').map_or(name, |dot| &name[..file + dot])
}

/// Whether a file or one of its folders begins with a dot, as those do that systems add (`._photo.jpg`).
fn is_hidden(name: &str) -> bool {
    name.split('/').any(|part| part.starts_with('.') && part != "." && part != "..")
}

/// A file of which no more than the budget can be read, whatever sizes it names. Seeking is free.
struct Metered<'a> {
    file: File,
    budget: &'a Cell<u64>,
}

impl Read for Metered<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let budget = self.budget.get();
        if budget == 0 {
            return Err(io::Error::other("a name of more than a megabyte"));
        }
        let most = buffer.len().min(budget as usize);
        let count = self.file.read(&mut buffer[..most])?;
        self.budget.set(budget - count as u64);
        Ok(count)
    }
}

impl Seek for Metered<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}
