//! CIFAR-10 in its binary version (Krizhevsky 2009): records of a label and a 32x32 image, colour planes one after
//! the other.

use std::fs;
use std::path::{Path, PathBuf};

use crate::data::Image;
use crate::{Error, Result};

const SIDE: usize = 32;
const PLANE: usize = SIDE * SIDE;
const RECORD: usize = 1 + 3 * PLANE;
const CLASSES: usize = 10;

/// CIFAR-10, held in memory.
#[derive(Debug)]
pub struct Cifar {
    path: PathBuf,
    /// `RECORD` bytes for each sample.
    records: Vec<u8>,
    /// Name of each batch, and its first sample.
    batches: Vec<(String, usize)>,
    classes: Vec<String>,
}

/// The batches in `path` or in its child `cifar-10-batches-bin`, or `None` if there are none.
pub(super) fn batches(path: &Path) -> Result<Option<Vec<PathBuf>>> {
    let exists = |file: &PathBuf| {
        file.try_exists()
            .map_err(|e| Error::data(file, format!("cannot be read ({e}); make it readable")))
    };
    for folder in [path.to_path_buf(), path.join("cifar-10-batches-bin")] {
        let mut found = Vec::new();
        for i in 1..=5 {
            let file = folder.join(format!("data_batch_{i}.bin"));
            if exists(&file)? {
                found.push(file);
            }
        }
        let test = folder.join("test_batch.bin");
        if found.is_empty() && exists(&test)? {
            found.push(test);
        }
        if !found.is_empty() {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

impl Cifar {
    pub(super) fn open(path: &Path, files: &[PathBuf]) -> Result<Self> {
        let mut records = Vec::new();
        let mut batches = Vec::new();
        for file in files {
            let bytes = fs::read(file).map_err(|e| {
                Error::data(file, format!("cannot be read ({e}); make it readable"))
            })?;
            if bytes.is_empty() || !bytes.len().is_multiple_of(RECORD) {
                return Err(Error::data(
                    file,
                    format!(
                        "has {} bytes, not a multiple of the {RECORD} of a CIFAR-10 record; \
                         unpack cifar-10-binary.tar.gz again",
                        bytes.len()
                    ),
                ));
            }
            let (batch, _) = bytes.as_chunks::<RECORD>();
            if let Some(i) = batch.iter().position(|record| usize::from(record[0]) >= CLASSES) {
                return Err(Error::data(
                    file,
                    format!(
                        "has label {} in record {i}, CIFAR-10 has 0 to 9; \
                         unpack cifar-10-binary.tar.gz again",
                        batch[i][0]
                    ),
                ));
            }
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            batches.push((name, records.len() / RECORD));
            records.extend_from_slice(&bytes);
        }
        let meta = files[0].with_file_name("batches.meta.txt");
        let mut classes: Vec<String> = fs::read_to_string(meta)
            .unwrap_or_default()
            .lines()
            .map(|line| line.trim().to_owned())
            .filter(|line| !line.is_empty())
            .collect();
        // The names only label pictures: without the file, or with another, numbers do.
        if classes.len() != CLASSES {
            classes = (0..CLASSES).map(|class| class.to_string()).collect();
        }
        Ok(Self { path: path.into(), records, batches, classes })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn len(&self) -> usize {
        self.records.len() / RECORD
    }

    pub(super) fn name(&self, sample: usize) -> String {
        assert!(sample < self.len());
        let batch = self.batches.partition_point(|(_, first)| *first <= sample) - 1;
        let (name, first) = &self.batches[batch];
        format!("{name}:{}", sample - first)
    }

    pub(super) fn label(&self, sample: usize) -> usize {
        usize::from(self.records[sample * RECORD])
    }

    pub(super) fn classes(&self) -> &[String] {
        &self.classes
    }

    pub(super) fn crc(&self, sample: usize) -> u32 {
        crc32c::crc32c(&self.records[sample * RECORD..][..RECORD])
    }

    pub(super) fn read(&self, sample: usize) -> Image {
        let planes = &self.records[sample * RECORD + 1..][..3 * PLANE];
        let pixels: Vec<u8> = (0..PLANE)
            .flat_map(|i| [planes[i], planes[PLANE + i], planes[2 * PLANE + i]])
            .collect();
        Image { height: SIDE, width: SIDE, pixels: pixels.into() }
    }
}
