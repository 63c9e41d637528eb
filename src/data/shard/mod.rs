//! Packed shards: decoded images, resized once, one after the other in files that are mapped into memory.
//!
//! A set of shards is a folder of files `*.shard`. All of them are there, in the order of their names, and each says which
//! of how many it is. A file is, with all numbers little-endian and strings as a `u32` of bytes and UTF-8:
//!
//! | bytes | what |
//! |---|---|
//! | 128 | header |
//! | | pixels of each image, `(height, width, 3)` RGB, then zeros up to the next multiple of 64 |
//! | 24 each | for each image: offset of its pixels `u64`, height `u32`, width `u32`, label `u32` (2^32 - 1: none), CRC-32C of its pixels and of the zeros after them `u32` |
//! | | name of each image; name of each class; of each sample that could not be read: its number in the source `u64`, its name, why |
//!
//! All from the third line on is the index. It ends where the file ends. The header:
//!
//! | offset | what |
//! |---|---|
//! | 0 | `pixshard` |
//! | 8 | version `u32`, 1 |
//! | 12 | short side of the images `u32`; 0: not resized |
//! | 16 | interpolation `u32`: 0 bicubic, 1 bilinear |
//! | 20 | shards in the set `u32` |
//! | 24 | number of this one `u32`, from 0 |
//! | 28 | fingerprint of what was packed and how `u32`, alike in the set |
//! | 32 | first sample of the source that it stands for `u64`; it stands for as many as it has images and unreadable ones |
//! | 40 | offset of the index `u64` |
//! | 48 | bytes of the index `u64` |
//! | 56 | images `u32` |
//! | 60 | samples that could not be read `u32` |
//! | 64 | classes `u32` |
//! | 68 | CRC-32C of the index `u32` |
//! | 72 | zeros |
//! | 124 | CRC-32C of the bytes before it `u32` |
//!
//! So each byte of a file is under one of the sums. Nothing in it is trusted: [`Shard::open`] judges header and index,
//! [`Shard::read`] the pixels of the image it gives.

mod read;
mod write;

use crate::train::config::Interpolation;

pub use self::read::Shard;
pub(super) use self::read::Shards;
pub use self::write::ShardWriter;

/// Ending of a shard's name.
pub const EXTENSION: &str = "shard";
/// Most images in a shard; as many unreadable samples and classes may it name.
pub const MAX_IMAGES: u32 = 1 << 20;

const MAGIC: [u8; 8] = *b"pixshard";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 128;
/// Images begin at multiples of this: a cache line, and more than the widest vector.
const ALIGN: u64 = 64;
const RECORD_BYTES: usize = 24;
const NO_LABEL: u32 = u32::MAX;
/// Largest index; bounds what a damaged header can make us allocate.
const MAX_INDEX_BYTES: u64 = 1 << 28;

/// What the shards of a set have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    /// Shards in the set.
    pub shards: u32,
    /// Short side that images were resized to, in pixels; 0: they were not.
    pub side: u32,
    /// Interpolation of the resize.
    pub interpolation: Interpolation,
    /// Tells what was packed, and how, from anything else.
    pub fingerprint: u32,
    /// Names of the classes.
    pub classes: Vec<String>,
}

/// The fixed part of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Header {
    side: u32,
    interpolation: Interpolation,
    shards: u32,
    number: u32,
    fingerprint: u32,
    first_sample: u64,
    index_offset: u64,
    index_bytes: u64,
    images: u32,
    skipped: u32,
    classes: u32,
    index_crc: u32,
}

/// An image of the index.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    offset: u64,
    height: u32,
    width: u32,
    label: u32,
    /// Of the pixels and the zeros after them.
    crc: u32,
    name: Box<str>,
}

impl Header {
    fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let interpolation = match self.interpolation {
            Interpolation::Bicubic => 0u32,
            Interpolation::Bilinear => 1,
        };
        let fields: [&[u8]; 14] = [
            &MAGIC,
            &VERSION.to_le_bytes(),
            &self.side.to_le_bytes(),
            &interpolation.to_le_bytes(),
            &self.shards.to_le_bytes(),
            &self.number.to_le_bytes(),
            &self.fingerprint.to_le_bytes(),
            &self.first_sample.to_le_bytes(),
            &self.index_offset.to_le_bytes(),
            &self.index_bytes.to_le_bytes(),
            &self.images.to_le_bytes(),
            &self.skipped.to_le_bytes(),
            &self.classes.to_le_bytes(),
            &self.index_crc.to_le_bytes(),
        ];
        let mut bytes = fields.concat();
        bytes.resize(HEADER_BYTES - 4, 0);
        bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
        bytes.try_into().expect("filled up to HEADER_BYTES")
    }

    /// Reads a header; what is wrong with it, if something is.
    fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Result<Self, String> {
        let mut fields = Fields(bytes);
        if fields.array() != Some(MAGIC) {
            return Err("it does not begin as a shard does".into());
        }
        let (before, sum) = bytes.split_at(HEADER_BYTES - 4);
        if crc32c::crc32c(before).to_le_bytes() != sum {
            return Err("its header is not what its checksum says".into());
        }
        let header = (|| {
            let version = fields.u32()?;
            let side = fields.u32()?;
            let interpolation = fields.u32()?;
            let header = Self {
                side,
                interpolation: Interpolation::Bicubic,
                shards: fields.u32()?,
                number: fields.u32()?,
                fingerprint: fields.u32()?,
                first_sample: fields.u64()?,
                index_offset: fields.u64()?,
                index_bytes: fields.u64()?,
                images: fields.u32()?,
                skipped: fields.u32()?,
                classes: fields.u32()?,
                index_crc: fields.u32()?,
            };
            Some((version, interpolation, header))
        })();
        let (version, interpolation, header) = header.expect("HEADER_BYTES hold all fields");
        if version != VERSION {
            return Err(format!(
                "it has version {version} of the format, this program reads {VERSION}"
            ));
        }
        let interpolation = match interpolation {
            0 => Interpolation::Bicubic,
            1 => Interpolation::Bilinear,
            other => return Err(format!("its interpolation is {other}, may be 0 or 1")),
        };
        let most = header.images.max(header.skipped).max(header.classes);
        if most > MAX_IMAGES {
            return Err(format!(
                "it has {most} images, bad ones or classes, may have {MAX_IMAGES}"
            ));
        }
        if header.number >= header.shards {
            return Err(format!("it is number {} of {} shards", header.number, header.shards));
        }
        Ok(Self { interpolation, ..header })
    }
}

/// Fields of a file that are yet to be read; `None` where they end too early.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(bytes)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// A string of UTF-8.
    fn text(&mut self) -> Option<&'a str> {
        let count = usize::try_from(self.u32()?).ok()?;
        std::str::from_utf8(self.bytes(count)?).ok()
    }
}
