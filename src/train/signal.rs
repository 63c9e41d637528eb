//! Signals that end a run in good order.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// Exit code of a program ended by SIGINT, as shells report it.
const EXIT_SIGINT: i32 = 130;

/// From now on the first SIGINT or SIGTERM sets the flag that is returned, for [`crate::train::run::run`]
/// to save and stop; a SIGINT while the flag is set ends the process at once with exit code 130.
///
/// # Errors
/// When the system refuses to install a handler.
pub fn install() -> io::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    // Handlers run in the order of registration: this one must see the flag as it was before the signal.
    flag::register_conditional_shutdown(SIGINT, EXIT_SIGINT, Arc::clone(&stop))?;
    flag::register(SIGINT, Arc::clone(&stop))?;
    flag::register(SIGTERM, Arc::clone(&stop))?;
    Ok(stop)
}
