// Ghost features of one token, and of a batch their gradients, compiled once per path as steps.inl is. They go by
// channels, and each feature by the tokens of its kernel from left to right: every product and every sum is rounded, as
// GhostFeatures of ghost.py does. Gradients are summed token by token: the same bits on every path.

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
        total = total + (feature < zero ? zero : feature) * taken(ghosts.scale.get() + f * n + channel, zero);
    }
    __builtin_memcpy(out + channel, &total, sizeof(T));
}

QB_TARGET static void ghost_row(const Ghosts& ghosts, const float* const* taps, long n, float* out) {
    long channel = 0;
    for (; channel + kWide <= n; channel += kWide) ghost_channels(ghosts, taps, n, channel, out, fv{});
    for (; channel < n; ++channel) ghost_channels(ghosts, taps, n, channel, out, 0.0f);
}

template <typename T>
QB_INLINE void add_to(float* sum, T value) {
    value = taken(sum, value) + value;
    __builtin_memcpy(sum, &value, sizeof(T));
}

// kTaps: the size of the kernels, 0 if it is known only now.
template <int kTaps, typename T>
QB_INLINE void ghost_gradient_channels(const GhostGradient& g, long channel, T zero) {
    const long n = g.columns, size = kTaps ? kTaps : g.size, half = size / 2, rows = g.sentences * g.tokens;
    for (long row = 0, token = 0; row < rows; ++row, token = token + 1 < g.tokens ? token + 1 : 0) {
        if (g.real && !g.real[row]) continue;
        T x[kTaps ? kTaps : kMostTaps], of_x[kTaps ? kTaps : kMostTaps];
        bool there[kTaps ? kTaps : kMostTaps];
        for (long t = 0; t < size; ++t) {
            const long shift = t - half, at = token + shift;
            there[t] = at >= 0 && at < g.tokens && (!g.real || g.real[row + shift]);
            x[t] = there[t] ? taken(g.y + (row + shift) * n + channel, zero) : zero;
            of_x[t] = zero;
        }
        const T gradient = taken(g.gradient + row * n + channel, zero);
        for (long f = 0; f < g.features; ++f) {
            const long first = f * size * n + channel, at = f * n + channel;
            T feature = x[0] * taken(g.kernels + first, zero);
            for (long t = 1; t < size; ++t) feature = feature + x[t] * taken(g.kernels + first + t * n, zero);
            add_to(g.of_scale + at, gradient * (feature < zero ? zero : feature));
            const T inner = feature <= zero ? zero : gradient * taken(g.scale + at, zero);
            for (long t = 0; t < size; ++t) {
                add_to(g.of_kernels + first + t * n, inner * x[t]);
                of_x[t] = of_x[t] + inner * taken(g.kernels + first + t * n, zero);
            }
        }
        for (long t = 0; t < size; ++t)
            if (there[t]) add_to(g.of_y + (row + t - half) * n + channel, of_x[t]);
    }
}

template <int kTaps>
QB_INLINE void ghost_gradient_from(const GhostGradient& g, long channel, long last) {
    for (; channel + kWide <= last; channel += kWide) ghost_gradient_channels<kTaps>(g, channel, fv{});
    for (; channel < last; ++channel) ghost_gradient_channels<kTaps>(g, channel, 0.0f);
}

QB_TARGET static void ghost_gradient(const GhostGradient& g, long first, long last) {
    if (g.size == 3) ghost_gradient_from<3>(g, first, last);
    else ghost_gradient_from<0>(g, first, last);
}
