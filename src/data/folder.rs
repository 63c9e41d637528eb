//! A folder tree of image files. The rules are those of [`Source::open`](super::source::Source::open).

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::data::Image;
use crate::data::decode::{self, Options};
use crate::{Error, Result};

/// Folders within folders that are entered.
const MAX_DEPTH: usize = 32;

/// Images in a folder tree.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    options: Options,
    /// Relative to `path`, ordered by their bytes.
    files: Vec<PathBuf>,
    /// Class of each file.
    labels: Vec<Option<u32>>,
    classes: Vec<String>,
}

impl Folder {
    pub(super) fn open(path: &Path, options: &Options) -> Result<Self> {
        let mut files = Vec::new();
        list(path, Path::new(""), 0, &mut files)?;
        if files.is_empty() {
            return Err(Error::data(
                path,
                "holds no .jpg, .jpeg, .png or .webp file, nor do its subfolders; \
                 set data.path to a folder of images",
            ));
        }
        files.sort_unstable_by(|a, b| bytes(a).cmp(bytes(b)));

        // In sorted files, those of a class stand side by side.
        let mut classes: Vec<String> = Vec::new();
        let mut labels = Vec::with_capacity(files.len());
        let mut last = None;
        for file in &files {
            let folders = file.parent().unwrap_or(Path::new(""));
            labels.push(folders.components().next().map(|class| {
                if last != Some(class) {
                    classes.push(class.as_os_str().to_string_lossy().into_owned());
                    last = Some(class);
                }
                (classes.len() - 1) as u32
            }));
        }
        Ok(Self { path: path.into(), options: *options, files, labels, classes })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn len(&self) -> usize {
        self.files.len()
    }

    pub(super) fn name(&self, sample: usize) -> String {
        self.files[sample].to_string_lossy().into_owned()
    }

    pub(super) fn label(&self, sample: usize) -> Option<usize> {
        self.labels[sample].map(|label| label as usize)
    }

    pub(super) fn classes(&self) -> &[String] {
        &self.classes
    }

    /// Bytes of a file; `u64::MAX` if that cannot be told.
    pub(super) fn size(&self, sample: usize) -> u64 {
        fs::metadata(self.path.join(&self.files[sample])).map_or(u64::MAX, |data| data.len())
    }

    pub(super) fn read(&self, sample: usize) -> Result<Image, String> {
        let bytes = self.read_bytes(&self.path.join(&self.files[sample]))?;
        decode::decode(&bytes, &self.options).map_err(|e| e.to_string())
    }

    fn read_bytes(&self, path: &Path) -> Result<Vec<u8>, String> {
        let failed = |e: io::Error| e.to_string();
        // Judged before it is opened: opening a pipe would wait for its other end.
        let metadata = fs::metadata(path).map_err(failed)?;
        if !metadata.is_file() {
            return Err("not a file".into());
        }
        self.options.check_file(metadata.len()).map_err(|e| e.to_string())?;
        let mut bytes = Vec::with_capacity(metadata.len() as usize + 1);
        // A file may grow while it is read.
        let limit = self.options.max_file_bytes.saturating_add(1);
        File::open(path).map_err(failed)?.take(limit).read_to_end(&mut bytes).map_err(failed)?;
        Ok(bytes)
    }
}

fn bytes(path: &Path) -> &[u8] {
    path.as_os_str().as_encoded_bytes()
}

/// Adds the images of `root/below` and its subfolders to `files`.
fn list(root: &Path, below: &Path, depth: usize, files: &mut Vec<PathBuf>) -> Result<()> {
    let folder = root.join(below);
    if depth > MAX_DEPTH {
        return Err(Error::data(
            folder,
            format!("lies more than {MAX_DEPTH} folders deep; move its images up"),
        ));
    }
    let failed = |e: io::Error| {
        Error::data(
            &folder,
            format!("cannot be listed ({e}); make it readable, or move it out of the data"),
        )
    };
    for entry in fs::read_dir(&folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        if name.as_encoded_bytes().starts_with(b".") {
            continue;
        }
        let path = below.join(&name);
        let kind = entry.file_type().map_err(failed)?;
        if kind.is_dir() {
            list(root, &path, depth + 1, files)?;
        } else if is_image_name(&path) {
            // A broken link stays in the list, to be reported as a bad image.
            let links_to_folder = kind.is_symlink() && root.join(&path).is_dir();
            if !links_to_folder {
                files.push(path);
            }
        }
    }
    Ok(())
}

pub(super) fn is_image_name(path: &Path) -> bool {
    let extension = path.extension().unwrap_or_default();
    ["jpg", "jpeg", "png", "webp"].iter().any(|known| extension.eq_ignore_ascii_case(known))
}
