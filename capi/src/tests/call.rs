//! Calls of exported functions with arguments that are data, so that a test can spoil them.

use crate::status::pixmim_status;

/// An argument as it is passed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Raw {
    /// An integer or an address.
    Word(u64),
    Number(f64),
}

impl Raw {
    pub(super) fn address<T>(pointer: *const T) -> Self {
        Self::Word(pointer.expose_provenance() as u64)
    }

    fn word(self) -> u64 {
        match self {
            Self::Word(word) => word,
            Self::Number(number) => panic!("{number} for an integer or a pointer"),
        }
    }
}

/// A C type that an argument may have.
pub(super) trait Passed {
    fn of(raw: Raw) -> Self;
}

impl Passed for f64 {
    fn of(raw: Raw) -> Self {
        match raw {
            Raw::Number(number) => number,
            Raw::Word(word) => panic!("{word} for a double"),
        }
    }
}

impl<T> Passed for *const T {
    fn of(raw: Raw) -> Self {
        std::ptr::with_exposed_provenance(raw.word() as usize)
    }
}

impl<T> Passed for *mut T {
    fn of(raw: Raw) -> Self {
        std::ptr::with_exposed_provenance_mut(raw.word() as usize)
    }
}

macro_rules! integers {
    ($($type:ty),*) => {$(
        impl Passed for $type {
            fn of(raw: Raw) -> Self {
                raw.word() as Self
            }
        }
    )*};
}
integers!(i32, i64, u64);

/// An exported function that returns a status.
pub(super) trait Exported {
    fn call(&self, args: &[Raw]) -> pixmim_status;
    /// Number of its arguments.
    fn arity(&self) -> usize;
}

macro_rules! exported {
    ($($arg:ident)*) => {
        impl<$($arg: Passed),*> Exported for unsafe extern "C" fn($($arg),*) -> pixmim_status {
            fn call(&self, args: &[Raw]) -> pixmim_status {
                assert_eq!(args.len(), self.arity());
                let mut args = args.iter().copied();
                let mut next = || args.next().unwrap();
                // SAFETY: a pointer is null, misaligned or leads to what the header says: what a test passes is either an
                // argument of a case, which owns its memory, or that spoilt in such a way.
                unsafe { self($($arg::of(next())),*) }
            }

            fn arity(&self) -> usize {
                [$(stringify!($arg)),*].len()
            }
        }
    };
}
exported!(A B);
exported!(A B C);
exported!(A B C D);
exported!(A B C D E);
exported!(A B C D E F);
exported!(A B C D E F G);
exported!(A B C D E F G H);
exported!(A B C D E F G H I);
exported!(A B C D E F G H I J);
exported!(A B C D E F G H I J K);
exported!(A B C D E F G H I J K L);
