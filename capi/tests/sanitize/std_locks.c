/* What ThreadSanitizer must be told of Rust's standard library.
 *
 * The compiled standard library is not instrumented. What is inlined from it is: locking a free `Mutex`, atomics, channels.
 * Its two slow paths are not: waiting for a `Mutex`, and for a `Condvar`, which lets go of one. Without them the sanitizer
 * would miss that who unlocks comes before who locks next, and call races what is none. The linker puts these functions in
 * their place (--wrap); scripts/sanitize gives their mangled names. A futex-based lock is its own address, at which the
 * inlined paths synchronise too. */
#define STRING(x) #x
#define SYMBOL(prefix, name) __asm__(prefix STRING(name))

void __tsan_acquire(void *);
void __tsan_release(void *);

void real_lock(void *mutex) SYMBOL("__real_", MUTEX_LOCK_CONTENDED);
void wrapped_lock(void *mutex) SYMBOL("__wrap_", MUTEX_LOCK_CONTENDED);
void real_wait(void *condvar, void *mutex) SYMBOL("__real_", CONDVAR_WAIT);
void wrapped_wait(void *condvar, void *mutex) SYMBOL("__wrap_", CONDVAR_WAIT);

void wrapped_lock(void *mutex) {
  real_lock(mutex);
  __tsan_acquire(mutex);
}

void wrapped_wait(void *condvar, void *mutex) {
  __tsan_release(mutex);
  real_wait(condvar, mutex);
  __tsan_acquire(mutex);
}
