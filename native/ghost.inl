// Ghost features of one token, compiled once per path as steps.inl is. They go by channels, and each feature by the
// tokens of its kernel from left to right: every product and every sum is rounded, as GhostFeatures of ghost.py does.

template <typename T>
QB_INLINE T taken(const float* x, T value) {
    __builtin_memcpy(&value, x, sizeof(T));
    return value;
}

template <typename T>
QB_INLINE void ghost_channels(const Ghosts& ghosts, const float* const* taps, long n, long channel, float* out, T zero) {
    T total = taken(taps[ghosts.size / 2] + channel, zero);
    const float* kernel = ghosts.kernels.get() + channel;
    for (long f = 0; f < ghosts.features; ++f) {
        T feature = taken(taps[0] + channel, zero) * taken(kernel, zero);
        kernel += n;
        for (long t = 1; t < ghosts.size; ++t, kernel += n)
            feature = feature + taken(taps[t] + channel, zero) * taken(kernel, zero);
        total = total + (feature > zero ? feature : zero) * taken(ghosts.scale.get() + f * n + channel, zero);
    }
    __builtin_memcpy(out + channel, &total, sizeof(T));
}

QB_TARGET static void ghost_row(const Ghosts& ghosts, const float* const* taps, long n, float* out) {
    long channel = 0;
    for (; channel + kWide <= n; channel += kWide) ghost_channels(ghosts, taps, n, channel, out, fv{});
    for (; channel < n; ++channel) ghost_channels(ghosts, taps, n, channel, out, 0.0f);
}
